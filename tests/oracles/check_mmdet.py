"""mmdetection's own code as the oracle: its networks, converted by tools/convert_weights.py, have the same detections.

`tests/weights/test_foreign.py` compares with an independent implementation of mmdetection (`peer_mmdetection.py`). This
script runs mmdetection itself (configs, networks, training loop, checkpoints, image pipeline) and shows for a few
networks that both the independent implementation and the import agree with it. It is not part of the test suite,
because mmdetection needs its own environment, created from the root of the repository:

    uv venv --python 3.11 ../mmdet-venv
    uv pip install --python ../mmdet-venv -c constraints.txt -e .
    uv pip install --python ../mmdet-venv addict termcolor yapf terminaltables shapely scipy matplotlib six tqdm
    uv pip install --python ../mmdet-venv --no-deps mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.2.0

(`--no-deps`, or opencv-python would overwrite opencv-python-headless.) Run it for all cases, or for those given:

    OMP_NUM_THREADS=1 ../mmdet-venv/bin/python -m tests.oracles.check_mmdet [r50 caffe r18 x101]

It takes about a minute on one core; the exit code is 0 if everything agrees. mmcv-lite lacks mmcv's compiled
operations, so `mmcv.ops` is replaced by a stand-in with only NMS (torchvision's): a RetinaNet on a CPU uses no other.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import ops

from detector.checkpoint import load_checkpoint
from detector.datasets.images import decode_image
from detector.inference.predictor import load_predictor
from tests.weights.peer_mmdetection import mmdet_detect, mmdet_state
from tests.weights.peer_models import (
    MAX_SIZE,
    MIN_SIZE,
    R18,
    R50,
    SHAPES,
    X101_32,
    Body,
    PeerDetections,
    State,
    assert_same_detections,
    calibrate,
    detect_with_package,
    unmatched,
    write_images,
)
from tools.convert_weights import main as convert

LIMIT = 10_000
"""Detections per image on both sides: if the limit were reached, the lowest scores would be near-ties."""

OWN_CLASSES = ("bolt", "nut", "washer")


class _StubOps(types.ModuleType):
    """A module with a class of every name; none is used."""

    __path__: list[str] = []  # noqa: RUF012 -- makes it a package

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: Any, class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    """torchvision's NMS with mmcv's signature: (n, 5) boxes with scores, and their indices."""
    assert nms_cfg["type"] == "nms"
    assert not class_agnostic
    keep = ops.batched_nms(boxes, scores, idxs, nms_cfg["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


def start_mmdet() -> None:
    """Import mmdetection and have it register its modules."""
    vars(import_module("mmcv"))["__version__"] = "2.1.0"  # mmdet 3.3.0 rejects 2.2.0 by its number alone
    parts = "carafe deform_conv merge_cells modulated_deform_conv multi_scale_deform_attn nms roi_align"
    for name in ("mmcv.ops", *(f"mmcv.ops.{part}" for part in parts.split())):
        module = _StubOps(name)
        vars(module)["batched_nms"] = _batched_nms
        sys.modules[name] = module
    import_module("mmdet.utils").register_all_modules()


class Case(NamedTuple):
    """A network of mmdetection and the format of its file."""

    config: str
    """Name in mmdetection's configs/retinanet."""
    file: str
    save: Callable[[Any, State, Path, list[Path]], None]
    """Called with config, weights, file to write, images."""
    body: Body
    caffe: bool = False
    classes: tuple[str, ...] | None = None
    """Class names, if not COCO's."""
    num_images: int = len(SHAPES)
    spread: float = 1.0
    """Factor on the weights of the box predictor: above 1, some boxes are outside the image."""


def _coco_classes() -> tuple[str, ...]:
    return tuple(import_module("mmdet.datasets").CocoDataset.METAINFO["classes"])


def _save_as_2x(_: Any, state: State, path: Path, __: list[Path]) -> None:
    """Save in the format of the model zoo of 2.x: class names, no optimizer, and the style only in the file name."""
    meta = {"epoch": 12, "iter": 87960, "mmdet_version": "2.28.2", "CLASSES": _coco_classes()}
    import_module("mmengine.runner").save_checkpoint({"meta": meta, "state_dict": state}, str(path))


def _save_as_3x(config: Any, state: State, path: Path, _: list[Path]) -> None:
    """Save in the format of tools/model_converters/publish_model.py: config and class names, no optimizer."""
    dataset = {"classes": _coco_classes(), "palette": [(220, 20, 60)] * 80}
    meta = {"epoch": 12, "iter": 87960, "cfg": config.pretty_text, "seed": 7, "dataset_meta": dataset}
    import_module("mmengine.runner").save_checkpoint({"meta": meta, "state_dict": state}, str(path))


def _save_by_training(config: Any, state: State, path: Path, images: list[Path]) -> None:
    """Save with mmengine's Runner after an epoch of three steps: optimizer, schedule, message hub with histories."""
    folder = path.parent
    torch.save({"state_dict": state}, folder / "start.pth")
    _write_annotations(folder / "train.json", images)
    config = config.copy()
    config.work_dir = str(folder)
    config.load_from = str(folder / "start.pth")  # in place of the initial weights, which would be downloaded
    config.model.backbone.init_cfg = None
    config.randomness = {"seed": 0}
    config.log_level = "ERROR"
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    config.test_dataloader = config.test_cfg = config.test_evaluator = None
    config.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 1}
    config.optim_wrapper.optimizer.lr = 0.05  # the warm-up starts with a thousandth of it
    config.optim_wrapper.clip_grad = {"max_norm": 1.0}  # so that the weights still yield hundreds of detections
    loader = config.train_dataloader
    loader.num_workers, loader.persistent_workers = 0, False
    loader.dataset.data_root = str(folder)
    loader.dataset.ann_file = "train.json"
    loader.dataset.data_prefix = {"img": str(images[0].parent)}
    loader.dataset.metainfo = {"classes": OWN_CLASSES}
    next(step for step in loader.dataset.pipeline if step.type == "Resize").scale = (MAX_SIZE, MIN_SIZE)
    with contextlib.redirect_stdout(io.StringIO()):
        import_module("mmengine.runner").Runner.from_cfg(config).train()
    (folder / "epoch_1.pth").rename(path)


def _write_annotations(path: Path, image_paths: list[Path]) -> None:
    """Write a COCO file with a box of each class on each image."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, image_path in enumerate(image_paths):
        height, width = map(int, image_path.stem.split("_")[1].split("x"))
        images.append({"id": i, "file_name": image_path.name, "height": height, "width": width})
        for k in range(len(OWN_CLASSES)):
            box = [width * 0.1 * (k + 1), height * 0.2, width * 0.5, height * 0.2 * (k + 1)]
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 10 * (k + 1), "iscrowd": 0}
            annotations.append({**entry, "bbox": box, "area": box[2] * box[3]})
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(OWN_CLASSES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


CASES: dict[str, Case] = {
    "r50": Case("retinanet_r50_fpn_1x_coco", "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth", _save_as_2x, R50),
    "caffe": Case("retinanet_r50-caffe_fpn_1x_coco", "epoch_12.pth", _save_as_3x, R50, caffe=True),
    "r18": Case("retinanet_r18_fpn_1x_coco", "trained.pth", _save_by_training, R18, classes=OWN_CLASSES, spread=4.0),
    "x101": Case("retinanet_x101-32x4d_fpn_1x_coco", "epoch_12.pth", _save_as_3x, X101_32, num_images=2),
}


def config_of(case: Case) -> Any:
    """mmdetection's config, except for small images, other classes, and no effective limit on the detections."""
    package = import_module("mmdet").__file__
    assert package is not None
    path = Path(package).parent / ".mim" / "configs" / "retinanet" / f"{case.config}.py"
    config = import_module("mmengine.config").Config.fromfile(path)
    if case.classes is not None:
        config.model.bbox_head.num_classes = len(case.classes)
    config.model.test_cfg.max_per_img = LIMIT
    next(step for step in config.test_dataloader.dataset.pipeline if step.type == "Resize").scale = (MAX_SIZE, MIN_SIZE)
    return config


def network_of(config: Any, state: State) -> Any:
    """mmdetection's network, loaded strictly."""
    model = import_module("mmdet.registry").MODELS.build(config.model)
    model.load_state_dict(state, strict=True)
    model.cfg = config
    return model.eval()


def detect_with_mmdet(model: Any, image: Path) -> tuple[PeerDetections, list[Tensor]]:
    """Detections with boxes in pixels of the file, and the logits (9 * K, H, W) of every level."""
    outputs: list[Any] = []
    hook = model.bbox_head.register_forward_hook(lambda _, __, output: outputs.append(output))
    found = import_module("mmdet.apis").inference_detector(model, str(image)).pred_instances
    hook.remove()
    ((logits, _),) = outputs
    return PeerDetections(found.bboxes, found.scores, found.labels), [level[0] for level in logits]


def _without_empty_filter(model: Any, image: Path) -> PeerDetections:
    """Detections including boxes that are empty after clipping. (Their IoU is 0, so NMS keeps them all.)"""
    settings = model.bbox_head.test_cfg
    default, settings.min_bbox_size = settings.min_bbox_size, -1
    found, _ = detect_with_mmdet(model, image)
    settings.min_bbox_size = default
    return found


class LargestDifferences:
    """The largest differences between two implementations so far."""

    def __init__(self) -> None:
        self.box = self.score = self.logit = 0.0

    def compare_detections(self, one: PeerDetections, other: PeerDetections) -> None:
        """Compare each detection with the most similar one of the same class; unmatched ones are left out."""
        excluded = set(unmatched(one, other))
        for i in range(len(one.scores)):
            if i not in excluded:
                boxes = (other.boxes - one.boxes[i]).abs().amax(-1)
                scores = (other.scores - one.scores[i]).abs()
                nearest = (boxes + 100 * scores).masked_fill(other.labels != one.labels[i], torch.inf).argmin()
                self.box, self.score = max(self.box, float(boxes[nearest])), max(self.score, float(scores[nearest]))

    def compare_logits(self, one: list[Tensor], other: list[Tensor]) -> None:
        """Compare relative to the largest logit of a level; fail above rounding error."""
        assert len(one) == len(other)
        for level, (a, b) in enumerate(zip(one, other, strict=True)):
            assert a.shape == b.shape, f"P{level + 3}: {tuple(a.shape)} and {tuple(b.shape)}"
            relative = float((a - b).abs().max() / b.abs().max())
            assert relative <= 1e-5, f"P{level + 3}: logits differ by {relative:.1e} of the largest"
            self.logit = max(self.logit, relative)

    def __str__(self) -> str:
        return f"box {self.box:.1e} pixels, score {self.score:.1e}, logits {self.logit:.1e} of the largest"


def check(case: Case, folder: Path) -> None:
    """Raise AssertionError unless import and independent implementation have mmdetection's detections."""
    config = config_of(case)
    size: dict[str, Any] = {"min_size": MIN_SIZE, "max_size": MAX_SIZE, "body": case.body, "caffe": case.caffe}
    images = write_images(folder / "in")[: case.num_images]
    num_classes = len(case.classes or _coco_classes())
    state = mmdet_state(case.body, caffe=case.caffe, num_classes=num_classes)
    state["bbox_head.retina_reg.weight"] *= case.spread
    model = network_of(config, state)
    count = 300 if num_classes == 80 else 1000  # with few classes, NMS removes more
    calibrate(state, "bbox_head.retina_cls.bias", detect_with_mmdet(model, images[0])[1], count=count)

    stored = folder / case.file
    case.save(config, state, stored, images)
    content = torch.load(stored, weights_only=False)  # written just now; mmengine's histories are objects
    changed = sum(not torch.equal(state[k], v) for k, v in content["state_dict"].items())
    assert (changed > 0) == (case.save is _save_by_training)
    state = content["state_dict"]
    model = network_of(config, state)
    print(f"  file: {_summary(content)}; {len(state)} tensors, {changed} changed by training")

    checkpoint = folder / "converted.pt"
    settings = [f"data.min_size={MIN_SIZE}", f"data.max_size={MAX_SIZE}", f"postprocess.detections_per_img={LIMIT}"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert convert([str(stored), str(checkpoint), *settings]) == 0
    print("".join(f"  convert: {line}\n" for line in output.getvalue().partition("next:")[0].splitlines()), end="")
    categories = load_checkpoint(checkpoint).categories
    assert categories.names == (case.classes or _coco_classes())
    predictor = load_predictor(checkpoint, device=torch.device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        all_detections = detect_with_package(folder / "out", checkpoint, images)

    num_imported, num_expected, num_reimplemented, num_unmatched, num_empty = 0, 0, 0, 0, 0
    imported, reimplemented = LargestDifferences(), LargestDifferences()
    for image, detections in zip(images, all_detections, strict=True):
        found, logits = detect_with_mmdet(model, image)
        assert len(found.scores) < LIMIT
        expected = found._replace(labels=torch.tensor(categories.ids)[found.labels])
        assert_same_detections(detections, expected)
        imported.compare_detections(detections, expected)
        computed = predictor.outputs(decode_image(image, apply_exif=True)).cls_logits
        imported.compare_logits(
            [x[0].reshape(-1, num_classes) for x in computed], [_by_anchor(x, num_classes) for x in logits]
        )

        again, logits_again = mmdet_detect(state, image, **size)
        assert_same_detections(again, found)
        reimplemented.compare_detections(again, found)
        reimplemented.compare_logits(logits_again, logits)
        num_imported += len(detections.scores)
        num_expected += len(found.scores)
        num_reimplemented += len(again.scores)
        num_empty += len(_without_empty_filter(model, image).scores) - len(found.scores)
        num_unmatched += len(unmatched(detections, expected)) + len(unmatched(expected, detections))
    print(
        f"  {len(images)} images; detections: {num_imported} imported, {num_expected} mmdetection, "
        f"{num_unmatched} unmatched"
    )
    print(f"  boxes that mmdetection drops because they are outside the image: {num_empty}")
    print(f"  largest differences of the import: {imported}")
    print(f"  largest differences of the independent implementation ({num_reimplemented} detections): {reimplemented}")
    assert num_expected >= 100 * len(images), "too few detections for a meaningful test"
    assert num_empty > 0 or case.spread == 1.0


def _by_anchor(logits: Tensor, num_classes: int) -> Tensor:
    """(9 * K, H, W) to (H * W * 9, K)."""
    return torch.unflatten(logits, 0, (9, num_classes)).permute(2, 3, 0, 1).reshape(-1, num_classes)


def _summary(content: dict[str, Any]) -> str:
    text = f"{', '.join(content)}; meta of {', '.join(content['meta'])}"
    if "message_hub" in content:
        histories = list(content["message_hub"]["log_scalars"].values())
        assert {type(history).__name__ for history in histories} == {"HistoryBuffer"}
        text += f"; {len(histories)} histories of {sum(len(history.data[0]) for history in histories)} numbers"
    return text


def main(argv: list[str] | None = None) -> int:
    """Check every case, or those given."""
    names = (sys.argv[1:] if argv is None else argv) or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"cases must be among {', '.join(CASES)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "110"
    warnings.simplefilter("ignore")  # from mmengine and mmcv about themselves
    logging.disable(logging.WARNING)
    start_mmdet()
    failed = []
    for name in names:
        print(f"{name}: {CASES[name].config}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                check(CASES[name], Path(folder))
        except Exception:  # noqa: BLE001 -- one failing case must not hide the others
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    print(f"FAILED: {', '.join(failed)}" if failed else f"all {len(names)} cases agree with mmdetection")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
