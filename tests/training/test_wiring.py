"""Whether a config's settings reach the code that uses them: each setting that the loop only passes on, seen at its
other end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from detector.config import Config
from detector.config_yaml import load_config
from detector.datasets.images import decode_image
from detector.datasets.loader import DetectionDataset
from detector.datasets.sampling import StepPlanner
from detector.evaluation import evaluate as evaluate_module
from detector.models import RetinaNet
from detector.structures import Batch
from detector.training import step_reader
from detector.training.optim import lr_factor, scaled_lr
from detector.training.run import Run as TrainingRun
from detector.training.train import train
from tests.tiny import (
    TinyData,
    images_of,
    last_checkpoint,
    records,
    tiny_config,
    write_coco,
    write_config,
)

ONLY_TRAIN: dict[str, Any] = {"train__epochs": 1, "data__val": None}


@pytest.fixture
def updates() -> Iterator[list[torch.optim.Optimizer]]:
    """Notes what every optimizer step works with: the rates of its groups and the norm of its gradients."""
    seen: list[Any] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        seen.append(({g["lr_factor"]: g["lr"] for g in groups}, norm, type(optimizer), groups))

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


# ---- the optimizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"optim__milestones": [0.4, 0.7], "optim__gamma": 0.3, "optim__lr_batch_size": 1},
        {
            "optim__name": "adamw",
            "optim__lr": 1e-4,
            "optim__lr_batch_size": 16,
            "optim__schedule": "cosine",
            "optim__final_lr_factor": 0.1,
        },
    ],
    ids=["sgd, multistep", "adamw, cosine"],
)
def test_every_step_has_the_scaled_rate_times_the_schedule(
    settings: dict[str, Any],
    data: TinyData,
    tmp_path: Path,
    updates: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(
        tmp_path, data, data__val=None, optim__backbone_lr_factor=0.1, optim__warmup_factor=0.5, **settings
    )
    train(config, tmp_path / "run")
    base, arithmetic = scaled_lr(config.optim, config.train.batch_size)
    wanted = [base * lr_factor(step, 6, config.optim) for step in range(6)]
    assert len(set(wanted)) > 3, "a rate that stands still shows nothing"
    assert [rates for rates, *_ in updates] == [{0.1: pytest.approx(0.1 * lr), 1.0: pytest.approx(lr)} for lr in wanted]
    assert [r["lr"] for r in records(tmp_path / "run")] == pytest.approx(wanted)
    assert arithmetic in capsys.readouterr().out
    assert {kind for _, _, kind, _ in updates} == {
        torch.optim.AdamW if config.optim.name == "adamw" else torch.optim.SGD
    }


def test_gradients_are_clipped_and_logged_as_they_were(data: TinyData, tmp_path: Path, updates: list[Any]) -> None:
    train(tiny_config(tmp_path, data, **ONLY_TRAIN, optim__clip_grad_norm=1e-3), tmp_path / "run")
    assert [norm for _, norm, *_ in updates] == pytest.approx([1e-3] * 3, rel=1e-2)
    assert all(r["grad_norm"] > 0.1 for r in records(tmp_path / "run"))


def test_momentum_and_decay_are_those_of_the_config(data: TinyData, tmp_path: Path, updates: list[Any]) -> None:
    train(tiny_config(tmp_path, data, **ONLY_TRAIN, optim__momentum=0.7, optim__weight_decay=0.03), tmp_path / "run")
    groups = updates[-1][3]
    assert {g["momentum"] for g in groups} == {0.7}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.03}, "norms and biases are not decayed"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_is_trained_and_scored_in_the_precisions_of_the_config(
    precision: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are set crosswise, so that one cannot be taken for the other."""
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    forward = RetinaNet.forward

    def spied(self: RetinaNet, *arguments: Any) -> Any:
        outputs = forward(self, *arguments)
        seen[self.training].update(logits.dtype for logits in outputs.cls_logits)
        return outputs

    monkeypatch.setattr(RetinaNet, "forward", spied)
    other = "bf16" if precision == "fp32" else "fp32"
    train(
        tiny_config(tmp_path, data, train__epochs=1, train__precision=precision, eval__precision=other), tmp_path / "r"
    )
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert seen == {True: {dtypes[precision]}, False: {dtypes[other]}}


# ---- what is trained on -----------------------------------------------------------------------------------------


def batches_of(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What a run would train on; all but the training itself is done."""
    seen: list[Batch] = []

    steps = TrainingRun.remaining_steps

    def collect(run: TrainingRun, epoch: int) -> Iterator[list[Batch]]:
        for micro_batches in steps(run, epoch):
            seen.extend(micro_batches)
            run.state.step += 1
        return iter(())

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "remaining_steps", collect)
        train(config, out)
    return seen


def images_by_id(batches: list[Batch]) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each image its pixels without the padding, and its boxes."""
    found = {}
    for batch in batches:
        for image_id, image, (h, w), boxes, labels in zip(
            batch.image_ids.tolist(),
            batch.images,
            batch.image_sizes.tolist(),
            batch.targets.boxes,
            batch.targets.labels,
            strict=True,
        ):
            found[image_id] = image[:, :h, :w], boxes[labels >= 0]
    return found


def test_images_are_mirrored_and_augmented_as_configured(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(name: str, **settings: Any) -> dict[int, tuple[Tensor, Tensor]]:
        config = tiny_config(tmp_path, data, **ONLY_TRAIN, **({"data__hflip": 0.0} | settings))
        return images_by_id(batches_of(config, tmp_path / name, monkeypatch))

    plain = images("plain")
    assert len(plain) == 11
    mirrored = images("mirrored", data__hflip=1.0)
    inverted = images("inverted", data__augment=[{"InvertImg": {"p": 1.0}}])
    for image_id, (image, boxes) in plain.items():
        width = image.shape[2]
        assert torch.equal(mirrored[image_id][0], image.flip(2))
        wanted = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        torch.testing.assert_close(mirrored[image_id][1], wanted)
        assert int((inverted[image_id][0].int() - (255 - image.int())).abs().max()) <= 1, "resized after, so rounded"
        torch.testing.assert_close(inverted[image_id][1], boxes)
    some = images("some", data__hflip=0.5)
    turned = sum(torch.equal(some[i][0], mirrored[i][0]) for i in plain)
    assert 0 < turned < 11


def test_steps_are_of_several_sizes_and_of_one_orientation_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = write_coco(tmp_path / "train.json", 32, seed=1, sizes=((96, 128), (128, 96)))
    data = TinyData(annotations, annotations)
    settings = {"data__min_size": [32, 48, 64], "data__max_size": 120, "train__epochs": 3, "data__val": None}
    grouped = batches_of(tiny_config(tmp_path, data, **settings), tmp_path / "grouped", monkeypatch)
    assert {int(b.image_sizes.min()) for b in grouped} == {32, 48, 64}
    assert all(len(set(b.image_sizes.min(dim=1).values.tolist())) == 1 for b in grouped), "one size for a step"

    def mixed(batch: Batch) -> bool:
        return len(set((batch.image_sizes[:, 0] > batch.image_sizes[:, 1]).tolist())) > 1

    assert not any(map(mixed, grouped))
    anyhow = tiny_config(tmp_path, data, **settings, data__aspect_ratio_grouping=False)
    assert any(map(mixed, batches_of(anyhow, tmp_path / "anyhow", monkeypatch)))


def test_the_order_of_images_is_the_seeds(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def order(seed: int, name: str) -> list[int]:
        config = tiny_config(tmp_path, data, **ONLY_TRAIN, train__seed=seed)
        return [int(i) for b in batches_of(config, tmp_path / name, monkeypatch) for i in b.image_ids]

    assert order(1, "a") == order(1, "b") != order(2, "c")


def test_the_loader_and_the_planner_get_their_settings(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, with values that are nobody's default."""
    config = tiny_config(
        tmp_path, data, **ONLY_TRAIN, model__resize="cv2_bilinear", data__min_size=[40, 56], data__max_size=99,
        data__hflip=0.25, data__on_error="skip", data__scaled_decode=False, data__augment_min_visibility=0.6,
        data__augment=[{"InvertImg": {"p": 1.0}}], data__aspect_ratio_grouping=False, train__seed=7,
        data__sampling="class_balanced",
    )  # fmt: skip
    made: dict[str, Any] = {}

    class Dataset(DetectionDataset):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            made["dataset"] = named
            super().__init__(*arguments, **named)

    class Planner(StepPlanner):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            made["planner"] = {"batch_size": arguments[1], **named}
            super().__init__(*arguments, **named)

    monkeypatch.setattr(step_reader, "DetectionDataset", Dataset)
    monkeypatch.setattr(step_reader, "StepPlanner", Planner)
    batches_of(config, tmp_path / "run", monkeypatch)
    augmentation = made["dataset"].pop("augmentation")
    assert made["dataset"] == {
        "max_size": 99, "resize": "cv2_bilinear", "hflip": 0.25, "seed": 7, "skip_unreadable": True,
        "scaled_decode": False,
    }  # fmt: skip
    assert augmentation.pipeline.processors["bboxes"].params.min_visibility == 0.6
    factors = made["planner"].pop("factors")
    assert factors is not None
    assert len(set(factors.tolist())) > 1
    assert made["planner"] == {
        "batch_size": 4, "min_sizes": (40, 56), "max_size": 99, "pad": "batch_max_32", "resize": "cv2_bilinear",
        "aspect_ratio_grouping": False, "seed": 7,
    }  # fmt: skip


# ---- what is scored, shown and logged -----------------------------------------------------------------------------


def test_a_model_is_scored_with_the_detections_that_the_config_counts(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches_of(tiny_config(tmp_path, data, train__epochs=1, eval__max_dets=[1, 2, 3]), tmp_path / "run", monkeypatch)
    scored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [name for name in scored if name.startswith("AR@")] == ["AR@1", "AR@2", "AR@3"]


@pytest.mark.parametrize(
    ("cls", "normalizer"),
    [("focal", "global"), ("focal", "per_image"), ("ohem", "global"), ("quality_focal", "per_image")],
)
def test_the_loss_of_the_val_set_is_what_training_would_make_of_it_in_one_step(
    cls: str, normalizer: str, tmp_path: Path
) -> None:
    """Trained on the same images in one step that changes nothing; evaluated in batches of three."""
    annotations = write_coco(tmp_path / "both.json", 8, seed=3, sizes=((96, 96),))
    config = tiny_config(
        tmp_path, TinyData(annotations, annotations), train__epochs=1, train__batch_size=8, data__hflip=0.0,
        loss__cls=cls, loss__normalizer=normalizer, optim__lr=1e-20, eval__batch_size=3,
    )  # fmt: skip
    train(config, tmp_path / "run")
    step, evaluation = records(tmp_path / "run")
    assert step["loss_box"] > 0
    for key in ("loss", "loss_cls", "loss_box"):
        assert evaluation[key] == pytest.approx(step[key], rel=1e-5)


def test_the_loss_of_the_val_set_can_be_spared(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches_of(tiny_config(tmp_path, data, train__epochs=1, eval__loss=False), tmp_path / "run", monkeypatch)
    assert "loss" not in records(tmp_path / "run")[-1]


def test_what_is_scored_and_kept_as_the_result_is_the_average(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[dict[str, Tensor]] = []

    def look(model: RetinaNet, *arguments: Any, **named: Any) -> Any:
        scored.append({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate_module.evaluate_model(model, *arguments, **named)

    monkeypatch.setattr("detector.training.validation.evaluate_model", look)
    config = tiny_config(tmp_path, data, train__epochs=1, train__ema={"decay": 0.9}, optim__warmup_steps=0)
    train(config, tmp_path / "run")
    state = last_checkpoint(tmp_path / "run")
    assert state.ema is not None
    assert any(not torch.equal(state.ema[k], state.model[k]) for k in state.ema)
    assert all(torch.equal(scored[0][k], value) for k, value in state.ema.items())
    assert all(torch.equal(state.weights[k], value) for k, value in state.ema.items())


def test_tensorboard_shows_each_chosen_image_with_its_truth(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, data, train__epochs=1, train__images_every_epochs=1)
    batches_of(config, tmp_path / "run", monkeypatch)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    events.Reload()
    tags = sorted(events.Tags()["images"])
    assert tags == [f"val: ground truth, detections/{i}" for i in range(5)]
    content = json.loads(data.val.read_text())
    for i, tag in enumerate(tags):
        (tmp_path / "shown.png").write_bytes(events.Images(tag)[-1].encoded_image_string)
        shown = decode_image(tmp_path / "shown.png", apply_exif=False).astype(int)
        image = decode_image(images_of(data.val) / content["images"][i]["file_name"], apply_exif=False)
        height, width = image.shape[:2]
        assert shown.shape[0] >= height
        assert shown.shape[1] >= 2 * width, "truth and predictions side by side"
        assert shown.std() > 10, "a image and not an empty canvas"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__anchors": {"sizes": [512.0, 600.0, 700.0, 800.0, 900.0]}}, "have no anchor with IoU >= 0.5"),
        (
            {"postprocess__score_thresh": 0.99},
            "no score above postprocess.score_thresh 0.99 (the highest of some images is 0.01",
        ),
        ({"optim__warmup_steps": 7}, "optim.warmup_steps 7 is longer than the run: 3 steps"),
        ({"eval__max_dets": [1, 2, 3], "data__val": "crowded"}, "images hold more than 3 objects"),
        ({"data__val": "one class"}, "classes have no objects here, so their AP is undefined"),
    ],
    ids=["anchors", "scores", "warm-up", "maxDets", "empty class"],
)
def test_what_seems_wrong_is_a_warning_before_it_costs_hours(
    settings: dict[str, Any],
    message: str,
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = settings.get("data__val")
    if kind is not None:
        annotations = write_coco(tmp_path / "val.json", 4, seed=3, objects=12)
        if kind == "one class":
            content = json.loads(annotations.read_text())
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
            annotations.write_text(json.dumps(content))
        settings = {**settings, "data__val": {"images": str(images_of(annotations)), "annotations": str(annotations)}}
    batches_of(tiny_config(tmp_path, data, **{"train__epochs": 1, **settings}), tmp_path / "run", monkeypatch)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert any(message in line for line in warnings), warnings


def test_a_run_with_nothing_unusual_has_no_warnings(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, data, postprocess__score_thresh=0.0, train__epochs=1)
    batches_of(config, tmp_path / "run", monkeypatch)
    assert "warning" not in capsys.readouterr().out


def test_resuming_with_other_versions_or_threads_is_a_warning(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", data, train__checkpoint_every_steps=1, data__val=None))

    def stop_soon(run: TrainingRun, *name: str) -> None:
        save(run, *name)
        raise KeyboardInterrupt

    save = TrainingRun.save
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "save", stop_soon)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    capsys.readouterr()
    versions = {"torch": "1.0", "torchvision": "0.1", "device": "cpu", "threads": "64", "processes": "1"}
    monkeypatch.setattr("detector.training.setup.numeric_versions", lambda _: versions)
    train(config, tmp_path / "run", resume="auto")
    printed = capsys.readouterr().out
    assert f"warning: torch was {torch.__version__}, is 1.0: resuming, but results will not be bit-identical" in printed
    assert "threads was 1, is 64" in printed
    assert "device was" not in printed
