"""What can be measured. Each case proves first that both sides compute the same, then times them.

A case returns rows: {"case", "row", "ours", "peer", ...} of numbers that `report` prints and the JSON file keeps.
"""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou
from torchvision.ops import sigmoid_focal_loss as torchvisions_focal_loss

from detector.anchors import pyramid_grids
from detector.config import ModelConfig
from detector.datasets.loader import to_device
from detector.inference.detector import Detector
from detector.inference.nms import has_triton
from detector.inference.postprocess import postprocess
from detector.losses import RetinaNetLoss
from detector.losses.dense import dense_focal_loss
from detector.memory import Work
from detector.models import RetinaNet, build_anchors
from detector.precision import DTYPES, Precision, autocast
from detector.structures import Batch, Detections, HeadOutputs
from detector.training.compile import compile_step
from detector.weights.from_torchvision import TORCHVISION_ANCHORS
from tools.benchmarks.measure import Measured, flops_of, interleaved, machine_peak, noise, seconds_of, where_time_goes
from tools.benchmarks.peers import Inputs, as_if_trained, make_inputs, make_ours, make_torchvision, their_name
from tools.benchmarks.pipeline import loading, opening, our_loader, scoring, write_pictures

Row = dict[str, Any]


class DifferentError(RuntimeError):
    """Ours and the peer do not compute the same, so that a ratio of their times would mean nothing."""


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    device: torch.device
    size: tuple[int, int] = (800, 800)
    batch: int = 2
    boxes: int = 10
    classes: int = 80
    backbone: str = "resnet50"
    precision: Literal["all"] | Precision = "all"
    compiled: bool | None = None
    """None: as training does it on this device."""
    checkpoint_activations: bool = False
    repeats: int = 7
    warmup: int = 2
    peer: bool = True
    trace: Path | None = None
    images: int = 5000
    workers: int = 2
    picture: tuple[int, int] = (480, 640)
    """Height and width of the loader's files."""
    say: Callable[[str], None] = print

    @property
    def compiles(self) -> bool:
        """Whether ours is compiled."""
        if self.compiled is None:
            return self.device.type == "cuda" and has_triton(self.device)
        return self.compiled


# ---- a training step --------------------------------------------------------------------------------------------------


class _Step(ABC):
    """Match, forward, loss, backward, update: the same optimizer for both."""

    def __init__(self, model: Any, options: Options, precision: Precision) -> None:
        self.model, self.options, self.precision = model, options, precision
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True)

    @abstractmethod
    def losses(self, x: Any) -> tuple[Tensor, Tensor]:
        """Class and box loss."""

    def __call__(self, x: Inputs | Batch) -> None:
        cls, box = self.losses(x)
        (cls + box).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class OurStep(_Step):
    """As `engine.train.train_one_epoch` does it with one micro-batch."""

    def __init__(self, model: RetinaNet, options: Options, precision: Precision, *, compiled: bool) -> None:
        super().__init__(model, options, precision)
        self.loss = RetinaNetLoss(box="l1", normalizer="per_image", low_quality_matches=True)
        if compiled:
            compile_step(model, self.loss)

    def losses(self, x: Inputs | Batch) -> tuple[Tensor, Tensor]:
        """Class and box loss."""
        grids = self.model.grids_of(x.images)
        matches = self.loss.match(self.model.anchors_of(x.images), x.targets, grids=grids)
        with autocast(self.precision, self.options.device):
            outputs = self.model(x.images, x.image_sizes)
        parts = self.loss(outputs, x.targets, matches=matches)
        return parts["loss_cls"], parts["loss_box"]


class TheirStep(_Step):
    """As torchvision's reference script does it."""

    def losses(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Class and box loss."""
        with autocast(self.precision, self.options.device):
            parts = self.model(x.floats, x.dicts)
        return parts["classification"], parts["bbox_regression"]


def train(options: Options) -> list[Row]:
    """A step with torchvision's anchors, matching and losses, frozen alike."""
    device = options.device
    x = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    x = x._replace(image_sizes=x.image_sizes.to(device))
    cuda = device.type == "cuda"
    wanted = _precisions(options)
    compiled = options.compiles
    again = ", activations computed again" if options.checkpoint_activations else ""
    rows = []
    peaks = {}
    for precision in wanted:
        ours, theirs = _pair(options, x)
        ours.train()
        ours.backbone.checkpointing = options.checkpoint_activations
        theirs.train()
        step = OurStep(ours, options, precision, compiled=compiled)
        peer = TheirStep(theirs, options, precision)
        facts = _same_losses(options, x, ours, theirs) if precision == wanted[0] and options.peer else {}
        ways: dict[str, Work] = {"ours": partial(step, x)}
        if options.peer:
            ways["peer"] = partial(peer, x)
        operations = flops_of(partial(peer, x))
        begun = time.monotonic()
        step(x)
        first = time.monotonic() - begun
        measured = interleaved(ways, repeats=options.repeats, warmup=options.warmup, device=device)
        if precision not in peaks:
            peaks[precision] = machine_peak(device, DTYPES[precision])
        rows.append(
            {
                "case": "train", "row": f"{precision}{', compiled' if compiled else ''}{again}", **_shape(options), **facts,
                "first_step_seconds": first, "slowest": _profiled(options, ways["ours"], f"train_{precision}"),
                **_figures(measured, images=options.batch, operations=operations, peak=peaks[precision]),
            }
        )  # fmt: skip
        del ours, theirs, step, peer, ways
        if cuda:
            torch.cuda.empty_cache()
    return rows


def _pair(options: Options, x: Inputs) -> tuple[RetinaNet, Any]:
    ours = make_ours(options.backbone, options.classes, options.device)
    as_if_trained(ours, x.images[:1], x.image_sizes[:1].to(options.device))
    return ours, make_torchvision(ours, options.backbone, options.classes, options.size)


def _same_losses(options: Options, x: Inputs, ours: RetinaNet, theirs: Any) -> Row:
    """In fp32 and before anything is compiled, both losses and all gradients must agree."""
    with torch.compiler.set_stance("force_eager"):
        mine = OurStep(ours, options, "fp32", compiled=False).losses(x)
        its = TheirStep(theirs, options, "fp32").losses(x)
        off = max(float(((a - b).abs() / b.abs()).detach()) for a, b in zip(mine, its, strict=True))
        if off > 1e-5:
            said = [[float(part.detach()) for part in parts] for parts in (mine, its)]
            raise DifferentError(f"losses must agree to 1e-5, got {said[0]} and {said[1]}")
        sum(mine).backward()  # type: ignore[union-attr]
        sum(its).backward()  # type: ignore[union-attr]
    its_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = {their_name(name): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    if our_gradients.keys() != its_gradients.keys():
        raise DifferentError(f"the same must be trained, got {sorted(our_gradients.keys() ^ its_gradients.keys())}")
    apart = torch.stack([(our_gradients[name] - gradient).norm() for name, gradient in its_gradients.items()]).norm()
    gradient = float(apart / torch.stack([g.norm() for g in its_gradients.values()]).norm())
    if gradient > 1e-3:
        raise DifferentError(f"gradients must agree to 1e-3, got {gradient:.1e}")
    for model in (ours, theirs):
        model.zero_grad(set_to_none=True)
    return {"loss_difference": off, "gradient_difference": gradient}


# ---- inference --------------------------------------------------------------------------------------------------------


def infer(options: Options) -> list[Row]:
    """Pictures on the device to lists of boxes in main memory."""
    device = options.device
    x = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    wanted = _precisions(options)
    ours, theirs = _pair(options, x)
    settings = _postprocess_settings({})
    facts = _same_objects(options, x, ours.eval(), theirs.eval()) if options.peer else {}
    rows = []
    for precision in wanted:
        detector = Detector(ours, settings, precision=precision, device=device)

        def run_ours(detector: Detector = detector) -> list[Detections]:
            return detector(x.images, x.image_sizes)

        @torch.inference_mode()
        def run_theirs(precision: Precision = precision) -> list[dict[str, Tensor]]:
            with autocast(precision, device):
                found = theirs(x.floats)
            return [{key: value.cpu() for key, value in one.items()} for one in found]

        ways: dict[str, Work] = {"ours": run_ours}
        if options.peer:
            ways["peer"] = run_theirs
        operations = flops_of(run_theirs)
        measured = interleaved(ways, repeats=options.repeats, warmup=max(3, options.warmup), device=device)
        rows.append(
            {
                "case": "infer", "row": precision, **_shape(options), **facts,
                "slowest": _profiled(options, run_ours, f"infer_{precision}"),
                **_figures(
                    measured, images=options.batch, operations=operations, peak=machine_peak(device, DTYPES[precision])
                ),
            }
        )  # fmt: skip
    return rows


def _same_objects(options: Options, x: Inputs, ours: RetinaNet, theirs: Any) -> Row:
    """In fp32 nearly all objects of the first image must be the same."""
    detector = Detector(ours, _postprocess_settings({}), precision="fp32", device=options.device)
    mine = detector(x.images[:1], x.image_sizes[:1])
    with torch.inference_mode():
        its = [{key: value.cpu() for key, value in one.items()} for one in theirs(x.floats[:1])]
    share = alike(mine, its)
    if share < 0.98 or not len(mine[0]):
        raise DifferentError(f"98 % of the objects must be the same in fp32, got {share:.3f} of {len(mine[0])}")
    return {"share_found_alike_fp32": share, "found": len(mine[0])}


def _postprocess_settings(changed: dict[str, Any]) -> dict[str, Any]:
    return {"score_thresh": 0.05, "topk_candidates": 1000, "nms_thresh": 0.5, "detections_per_img": 100, **changed}


def alike(ours: list[Detections], theirs: list[dict[str, Tensor]]) -> float:
    """The share of the peer's objects that are among ours: same class, boxes within 0.1 pixels."""
    same = total = 0
    for mine, its in zip(ours, theirs, strict=True):
        far = (mine.boxes[:, None] - its["boxes"].float()[None]).abs().amax(dim=2)
        same += int(((far < 0.1) & (mine.labels[:, None] == its["labels"][None])).any(dim=0).sum())
        total += len(its["labels"])
    return same / max(1, total)


# ---- parts ------------------------------------------------------------------------------------------------------------


def loss(options: Options) -> list[Row]:
    """The focal loss of all anchors and its gradient, against torchvision's function with its one-hot targets made ahead."""
    device = options.device
    anchors = _anchors(options)
    random = torch.Generator().manual_seed(0)
    labels = torch.full((options.batch, len(anchors)), -1)
    labels[:, torch.randperm(len(anchors), generator=random)[: len(anchors) // 1200 + 1]] = 3 % options.classes
    labels[:, torch.randperm(len(anchors), generator=random)[: len(anchors) // 240]] = -2
    labels = labels.to(device)
    logits = torch.randn(options.batch, len(anchors), options.classes, generator=random).to(device) - 4
    logits.requires_grad_()
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), options.classes) * (labels >= 0)[..., None]
    targets = one_hot.float()
    counted = (labels >= -1)[..., None].float()
    ours_of: Any = dense_focal_loss
    if options.compiles:
        ours_of = torch.compile(dense_focal_loss, dynamic=False)
    rows = []
    for precision in _precisions(options):
        x = logits.detach().to(DTYPES[precision]).requires_grad_()

        def run_ours(x: Tensor = x) -> Tensor:
            x.grad = None
            total: Tensor = ours_of(x, labels).sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total.detach()

        def run_theirs(x: Tensor = x) -> Tensor:
            x.grad = None
            total = (torchvisions_focal_loss(x, targets.to(x.dtype), alpha=0.25, gamma=2.0) * counted).sum()
            total.backward()
            result: Tensor = total.detach()
            return result

        mine, own = float(run_ours()), x.grad
        its, other = float(run_theirs()), x.grad
        assert own is not None
        assert other is not None
        facts = {"loss_difference": abs(mine - its) / its,
                 "gradient_difference": float((own.float() - other.float()).norm() / other.float().norm())}  # fmt: skip
        if precision == "fp32" and (facts["loss_difference"] > 1e-5 or facts["gradient_difference"] > 1e-4):
            raise DifferentError(f"losses and gradients must agree, got {facts}")
        del own, other
        x.grad = None
        measured = interleaved(
            {"ours": run_ours, "peer": run_theirs}, repeats=options.repeats, warmup=options.warmup, device=device
        )
        rows.append({"case": "loss", "row": precision, **_shape(options), **facts, **_figures(measured)})
    return rows


def match(options: Options) -> list[Row]:
    """Anchors to objects, with and without low-quality matches."""
    device = options.device
    anchors = _anchors(options)
    x = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    rows = []
    for low_quality in (True, False):
        loss = RetinaNetLoss(low_quality_matches=low_quality)
        if options.compiles:
            loss.match = torch.compile(loss.match, dynamic=False)  # type: ignore[method-assign]
        matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)

        def run_ours(loss: RetinaNetLoss = loss) -> Tensor:
            return loss.match(anchors, x.targets, grids=pyramid_grids(options.size)).matched

        def run_theirs(matcher: Matcher = matcher) -> Tensor:
            return torch.stack([matcher(box_iou(one["boxes"], anchors)) for one in x.dicts])

        different = int((run_ours() != run_theirs()).sum())
        if different > (0 if device.type == "cpu" else 10 * options.batch):
            raise DifferentError(f"matches must be the same, got {different} that differ")
        measured = interleaved(
            {"ours": run_ours, "peer": run_theirs}, repeats=options.repeats, warmup=options.warmup, device=device
        )
        row = "with low-quality matches" if low_quality else "without low-quality matches"
        rows.append({"case": "match", "row": row, **_shape(options), "different": different, **_figures(measured)})
    return rows


def postprocessing(options: Options) -> list[Row]:
    """Outputs of a network that finds about as much as a trained one, to lists of boxes."""
    device = options.device
    x = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    ours, theirs = _pair(options, x)
    theirs.eval()
    with torch.no_grad():
        outputs: HeadOutputs = ours.eval()(x.images, x.image_sizes.to(device))
    sizes = [options.size] * options.batch
    levels = list(torch.split(outputs.anchors, [d.shape[1] for d in outputs.box_deltas]))
    heads = {"cls_logits": list(outputs.cls_logits), "bbox_regression": list(outputs.box_deltas)}
    settings = _postprocess_settings({})

    def run_ours() -> list[Detections]:
        return postprocess(outputs, x.image_sizes, **settings)

    @torch.no_grad()
    def run_theirs() -> list[dict[str, Tensor]]:
        found = theirs.postprocess_detections(heads, [levels] * options.batch, sizes)
        return [{key: value.cpu() for key, value in one.items()} for one in found]

    facts = {"share_found_alike": alike(run_ours(), run_theirs()), "found": len(run_ours()[0])}
    if facts["share_found_alike"] < 0.99:
        raise DifferentError(f"the same must be found, got {facts}")
    measured = interleaved(
        {"ours": run_ours, "peer": run_theirs}, repeats=max(15, options.repeats), warmup=options.warmup, device=device
    )
    return [{"case": "postprocess", "row": "fp32", **_shape(options), **facts, **_figures(measured)}]


def scores(options: Options) -> list[Row]:
    """COCO's metrics, by hotcoco and by pycocotools."""
    row = f"{options.images} pictures, {100 * options.images} detections"
    return [{"case": "eval", "row": row, **scoring(options.images, repeats=options.repeats)}]


def opened(options: Options) -> list[Row]:
    """An annotation file read, by ours and by pycocotools."""
    found = opening(options.images, repeats=options.repeats)
    return [{"case": "open", "row": f"{options.images} pictures, {found['file_mb']:.0f} MB", **found}]


def loader(options: Options) -> list[Row]:
    """JPEG files to batches, against torchvision's reference pipeline."""
    found = loading(
        options.size, workers=options.workers, batch=options.batch, repeats=options.repeats, stored=options.picture
    )
    row = "{} workers, from {} x {}".format(options.workers, *options.picture)
    return [{"case": "loader", "row": row, **_shape(options), **found}]


def feed(options: Options) -> list[Row]:
    """Training steps from JPEG files, by way of the loader ("ours"), against as many with a batch that is already there."""
    device, precision = options.device, _precisions(options)[-1]
    compiled = options.compiles
    model = make_ours(options.backbone, options.classes, device).train()
    step = OurStep(model, options, precision, compiled=compiled)
    timed = {name: Measured() for name in ("ours", "peer", "again")}
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_pictures(Path(folder), min(options.images, max(256, 8 * options.batch)), options.picture)
        loader, count = our_loader(
            annotations, options.size, options.workers, options.batch, epochs=3 * options.repeats + 1
        )
        batches = (to_device(batch, device) for batch in loader)
        there = next(batches)
        for _ in range(2 * options.workers):  # what was read ahead while nothing computed
            step(there)
            there = next(batches)

        def from_files() -> None:
            for _ in range(count):
                step(next(batches))

        def from_memory() -> None:
            for _ in range(count):
                step(there)

        for _ in range(options.repeats):
            for name, work in (
                ("ours", from_files),
                ("peer", from_memory),
                ("again", from_files),
                ("peer", from_memory),
            ):
                timed[name].seconds.append(seconds_of(work, device) / count)
    row = "{}, {} workers, from {} x {}".format(precision, options.workers, *options.picture)
    return [{"case": "feed", "row": row, **_shape(options), **_figures(timed, images=options.batch)}]


def _precisions(options: Options) -> list[Precision]:
    return ["fp32", "bf16"] if options.precision == "all" else [options.precision]


def _anchors(options: Options) -> Tensor:
    generator = build_anchors(ModelConfig.model_validate({"anchors": TORCHVISION_ANCHORS.model_dump()}, strict=False))
    anchors: Tensor = generator(options.size, pyramid_grids(options.size), options.device)
    return anchors


# ---- figures ----------------------------------------------------------------------------------------------------------


def _profiled(options: Options, work: Work, name: str) -> list[tuple[str, float]]:
    if options.trace is None:
        return []
    return where_time_goes(work, options.device, options.trace / f"{name}.json.gz")


def _shape(options: Options) -> Row:
    return {
        "size": list(options.size), "batch": options.batch, "boxes": options.boxes, "classes": options.classes,
        "backbone": options.backbone,
    }  # fmt: skip


def _figures(
    measured: dict[str, Measured],
    *,
    images: int | None = None,
    operations: float | None = None,
    peak: float | None = None,
) -> Row:
    first = next(iter(measured))
    row: Row = {"noise": noise(measured, first)}
    for name, one in measured.items():
        if name == "again":
            continue
        row[name] = {
            "median_ms": one.median * 1e3, "spread": one.spread, "peak_mb": one.peak_bytes / 1e6,
            "seconds": one.seconds,
        }  # fmt: skip
        if images is not None:
            row[name]["images_per_second"] = images / one.median
        if operations is not None and peak is not None:
            row[name]["share_of_peak"] = operations / one.median / peak
    if peak is not None:
        row["peak_tflops"], row["gflop"] = peak / 1e12, (operations or 0) / 1e9
    if "peer" in measured:
        row["ratio"] = measured["peer"].median / measured[first].median
        row["memory_ratio"] = measured[first].peak_bytes / max(1, measured["peer"].peak_bytes)
    return row


CASES: dict[str, Callable[[Options], list[Row]]] = {
    "train": train, "infer": infer, "loss": loss, "match": match, "postprocess": postprocessing, "loader": loader,
    "eval": scores, "open": opened, "feed": feed,
}  # fmt: skip
