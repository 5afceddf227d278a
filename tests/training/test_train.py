"""The training run: what it leaves behind, how it ends, and what it refuses."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detector.atomic import read_json
from detector.checkpoint import load_checkpoint
from detector.config import resolve_data_paths
from detector.config_yaml import config_from_dict, load_config
from detector.errors import ConfigError, DatasetError, DivergedError, RunError, WeightsError
from detector.evaluation.coco_metrics import Metrics
from detector.evaluation.evaluate import evaluate_model
from detector.evaluation.score import score_checkpoint
from detector.losses import RetinaNetLoss
from detector.training import preflight as preflight_module
from detector.training import profiler as trace
from detector.training import run as run_module
from detector.training import validation as validation_module
from detector.training.compile import compile_step
from detector.training.preflight import require_settings
from detector.training.train import train
from tests.conftest import EVERYTHING_ON, Run
from tests.oracles import train_plainly
from tests.tiny import (
    CLASSES,
    TinyData,
    differing,
    images_of,
    last_checkpoint,
    records,
    tensors_of,
    tiny_config,
    write_coco,
    write_config,
    write_tiny_data,
)

TWELVE = [
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR@1", "AR@10", "AR@100", "AR_small", "AR_medium", "AR_large",
]  # fmt: skip
SHORT: dict[str, Any] = {"train__epochs": 1}


def split(annotations: Path) -> dict[str, str]:
    return {"images": str(images_of(annotations)), "annotations": str(annotations)}


def test_a_run_leaves_what_is_promised(whole: Run) -> None:
    files = {str(p.relative_to(whole.out)) for p in whole.out.rglob("*") if p.is_file()}
    events = {f for f in files if f.startswith("events.out.tfevents.")}
    problems = {f for f in files if f.startswith("problems_")}
    wanted = {
        "config.yaml",
        "metrics.jsonl",
        "metrics.json",
        *(f"checkpoints/{name}.pt" for name in ("last", "last-1", "best", "model")),
    }
    assert files - events - problems == wanted
    assert events
    assert load_config(whole.out / "config.yaml") == resolve_data_paths(load_config(whole.config))


def test_metrics_json_keeps_its_contract(whole: Run) -> None:
    assert json.loads((whole.out / "metrics.json").read_text())["format"] == 1
    metrics = read_json(whole.out / "metrics.json")
    assert list(metrics) == [*TWELVE, "per_class"]
    assert all(isinstance(metrics[name], float) and -1 <= metrics[name] <= 1 for name in TWELVE)
    for row, (name, category_id) in zip(metrics["per_class"], sorted(CLASSES.items(), key=lambda c: c[1]), strict=True):
        assert list(row) == ["category_id", "name", "num_gt", "AP", "AP50"]
        assert (row["category_id"], row["name"]) == (category_id, name)
        assert isinstance(row["num_gt"], int)


def test_the_log_has_every_step_and_every_evaluation_once(whole: Run) -> None:
    logged = records(whole.out)
    assert [r["step"] for r in logged if "lr" in r] == [1, 2, 3, 4, 5, 6]
    assert [(r["step"], r["epoch"], r["split"]) for r in logged if "split" in r] == [(3, 1, "val"), (6, 2, "val")]
    keys = {"step", "epoch", "loss", "loss_cls", "loss_box", "lr", "grad_norm", "num_pos"}
    assert all(set(r) == keys for r in logged if "lr" in r)


def test_a_compiled_run_learns_what_an_eager_one_learns(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured as on a GPU, where a break in a graph would be an error; code is not generated, which takes minutes."""
    monkeypatch.setattr(
        "detector.training.compile.compile_step", partial(compile_step, backend="eager", fullgraph=True)
    )
    for name, compile_it in (("eager", False), ("compiled", True)):
        train(tiny_config(tmp_path, data, **SHORT, train__compile=compile_it, data__val=None), tmp_path / name)
    eager, ours = last_checkpoint(tmp_path / "eager").model, last_checkpoint(tmp_path / "compiled").model
    for key, value in eager.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def test_a_run_without_any_fast_path_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32; what bf16 costs is measured (docs/benchmarks.md)."""
    annotations = write_coco(tmp_path / "train.json", 6, seed=3, suffix=".jpg")
    data, used = TinyData(annotations, annotations), set()
    train(tiny_config(tmp_path, data, **SHORT, data__val=None), tmp_path / "fast")

    def noted(name: str, plain: Any) -> Any:
        def replacement(*arguments: Any, **named: Any) -> Any:
            used.add(name)
            return plain(*arguments, **named)

        return replacement

    for module, name, plain in train_plainly.REPLACED:
        monkeypatch.setattr(module, name, noted(name, plain))
    train(tiny_config(tmp_path, data, **SHORT, data__val=None, train__channels_last=False), tmp_path / "plain")
    assert used == {name for _, name, _ in train_plainly.REPLACED}
    fast, wanted = last_checkpoint(tmp_path / "fast").model, last_checkpoint(tmp_path / "plain").model
    for key, value in wanted.items():
        torch.testing.assert_close(fast[key], value, rtol=1e-4, atol=1e-6)


def test_out_of_memory_is_reported_with_the_sizes_and_the_settings_that_help(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RetinaNetLoss, "forward", full)
    config = tiny_config(tmp_path, data, **SHORT, data__val=None, model__norm="bn", train__precision="fp32")
    with pytest.raises(
        RunError, match=r"at step 1: 1 image of 96 x 64 pixels did not fit; set data\.min_size below 64, or .*=bf16"
    ):
        train(config, tmp_path / "out")


def test_activations_are_not_computed_again_where_statistics_would_see_them_twice(
    data: TinyData, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, data, **SHORT, data__val=None, model__norm="bn", train__checkpoint_activations=True)
    with pytest.raises(ConfigError, match=r"checkpoint_activations must be false with model\.norm bn"):
        train(config, tmp_path / "out")


def test_a_run_that_computes_activations_again_ends_with_the_same_weights(data: TinyData, tmp_path: Path) -> None:
    for name, again in (("kept", False), ("again", True)):
        config = tiny_config(tmp_path, data, **SHORT, data__val=None, train__checkpoint_activations=again)
        train(config, tmp_path / name)
    kept, again_weights = last_checkpoint(tmp_path / "kept").model, last_checkpoint(tmp_path / "again").model
    assert all(torch.equal(value, again_weights[key]) for key, value in kept.items())


def test_some_steps_of_a_run_are_profiled_and_reported(
    whole: Run, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace, "WARMUP_STEPS", 2)
    train(tiny_config(tmp_path, data, **EVERYTHING_ON, train__trace_steps=3), tmp_path / "out")
    events = json.loads(gzip.decompress((tmp_path / "out" / "trace.json.gz").read_bytes()))["traceEvents"]
    updates = [e for e in events if str(e.get("name")).startswith("Optimizer.step#") and e.get("ph") == "X"]
    assert len(updates) == 3
    printed = capsys.readouterr().out
    assert "profiler trace of 3 steps in" in printed
    assert "ms  aten::convolution_backward" in printed
    actual, reference = (last_checkpoint(folder).model for folder in (tmp_path / "out", whole.out))
    assert all(torch.equal(value, reference[key]) for key, value in actual.items())


def test_a_run_too_short_to_be_profiled_warns(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(tmp_path, data, train__epochs=1, train__trace_steps=3), tmp_path / "out")
    assert "train.trace_steps=3 has no effect: only 3 steps remain" in capsys.readouterr().out
    assert not (tmp_path / "out" / "trace.json.gz").exists()


def test_a_checkpoint_describes_its_model(whole: Run) -> None:
    state = last_checkpoint(whole.out)
    assert state.categories.names == ("disc", "square", "bar")
    assert state.categories.ids == (3, 7, 90)
    assert (state.step, state.finished) == (6, True)
    assert set(state.versions) == {"torch", "torchvision", "device", "threads", "processes"}
    assert state.config == load_config(whole.out / "config.yaml")
    assert state.ema is not None
    assert any(not torch.equal(state.ema[k], v) for k, v in state.model.items())


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_runs_of_one_seed_are_bit_equal_whatever_the_number_of_workers(
    workers: int, whole: Run, data: TinyData, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, data, **EVERYTHING_ON, data__num_workers=workers)
    train(config, tmp_path / "run")
    assert differing(last_checkpoint(tmp_path / "run"), last_checkpoint(whole.out)) == []
    assert records(tmp_path / "run") == records(whole.out)


def test_another_seed_gives_other_weights(whole: Run, data: TinyData, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, data, **EVERYTHING_ON, **SHORT, train__seed=1), tmp_path / "run")
    assert differing(last_checkpoint(tmp_path / "run"), last_checkpoint(whole.out))


def test_a_rate_that_is_too_high_ends_the_run_with_the_images_named_and_good_checkpoints(
    data: TinyData, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path, data, optim__lr=1e6, optim__warmup_steps=0, train__checkpoint_every_steps=1, data__val=None
    )
    with pytest.raises(DivergedError, match="learning rate 1e\\+06, images") as caught:
        train(config, tmp_path / "run")
    report = read_json(tmp_path / "run" / "nonfinite.json")
    assert str(report["image_ids"]) in str(caught.value)
    assert report["first_fault"]["stage"] in ("module output", "loss", "gradient")
    assert "lower optim.lr, lengthen optim.warmup_steps or set optim.clip_grad_norm=1" in str(caught.value)
    assert all(torch.isfinite(t).all() for t in tensors_of(last_checkpoint(tmp_path / "run")).values())
    assert f"{tmp_path / 'run' / 'checkpoints'} holds the last good checkpoint" in str(caught.value)


def test_a_run_that_diverges_at_once_does_not_mention_a_checkpoint(data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, optim__lr=1e30, optim__warmup_steps=0, data__val=None)
    with pytest.raises(DivergedError, match="; no checkpoint was saved yet"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_went_wrong_reaches_no_weights(
    where: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step of three is made infinite; the checkpoint of the second stays, bit for bit."""
    config = tiny_config(tmp_path, data, **SHORT, data__val=None, train__checkpoint_every_steps=1, train__log_every=20)
    forward, count = RetinaNetLoss.forward, 0

    def broken(self: RetinaNetLoss, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        losses = forward(self, *arguments, **named)
        if count == 3:
            losses["loss_cls"] = (
                losses["loss_cls"] * torch.inf if where == "loss" else Explosive.apply(losses["loss_cls"])
            )
        return losses

    monkeypatch.setattr(RetinaNetLoss, "forward", broken)
    with pytest.raises(DivergedError, match="training diverged at step 2") as caught:
        train(config, tmp_path / "run")
    state = last_checkpoint(tmp_path / "run")
    assert state.step == 2
    assert all(torch.isfinite(t).all() for t in tensors_of(state).values())
    report = read_json(tmp_path / "run" / "nonfinite.json")
    ids = {int(i["id"]) for i in json.loads(data.train.read_text())["images"]}
    assert report["image_ids"]
    assert set(report["image_ids"]) <= ids
    assert str(report["image_ids"]) in str(caught.value)


class Explosive(torch.autograd.Function):
    """Changes nothing, but has no finite gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.nan


def test_a_run_without_a_val_set_ends_well(data: TinyData, tmp_path: Path) -> None:
    assert train(tiny_config(tmp_path, data, **SHORT, data__val=None), tmp_path / "run") == {}
    best, last = (load_checkpoint(tmp_path / "run" / "checkpoints" / f"{n}.pt") for n in ("best", "last"))
    assert differing(best, last) == []
    assert read_json(tmp_path / "run" / "metrics.json") == {}


def test_images_without_objects_can_be_trained_and_evaluated_on(tmp_path: Path) -> None:
    """The loss is finite, AP is undefined, and the run still leaves all it should."""
    data = TinyData(*(write_coco(tmp_path / f"{n}.json", 5, seed=0, objects=0) for n in ("train", "val")))
    metrics = train(tiny_config(tmp_path, data, train__epochs=2, data__test=split(data.val)), tmp_path / "run")
    assert [metrics[name] for name in TWELVE] == [-1.0] * 12
    assert metrics["test"]["AP"] == -1.0
    steps = [r for r in records(tmp_path / "run") if "lr" in r]
    assert all(r["loss"] > 0 and r["loss_box"] == 0 and r["num_pos"] == 0 for r in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt").step == 4, "the latest, where nothing is best"


def fake_evaluations(monkeypatch: pytest.MonkeyPatch, aps: list[float]) -> None:
    """Let the evaluations of a run find these APs."""
    given = iter(aps)

    def fake(*arguments: Any, **named: Any) -> Any:
        metrics, results = evaluate_model(*arguments, **named)
        return Metrics({**metrics.values, "AP": next(given)}, metrics.per_class), results

    monkeypatch.setattr(validation_module, "evaluate_model", fake)


def test_the_best_weights_are_kept_and_tested_and_the_last_ones_stay_the_last(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_evaluations(monkeypatch, [0.5, 0.4, 0.125])
    metrics = train(tiny_config(tmp_path, data, data__test=split(data.val)), tmp_path / "run")
    best, last = (load_checkpoint(tmp_path / "run" / "checkpoints" / f"{n}.pt") for n in ("best", "last"))
    assert (best.step, last.step) == (3, 6)
    assert any(name.startswith("model.") for name in differing(best, last)), "testing must not bring the best back"
    assert (metrics["AP"], metrics["test"]["AP"]) == (0.5, 0.125)
    assert read_json(tmp_path / "run" / "metrics.json") == metrics
    assert list(metrics["test"]) == [*TWELVE, "per_class"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """One image, so that an epoch is one step."""
    annotations = write_coco(tmp_path_factory.mktemp("single") / "one.json", 1, seed=1)
    return TinyData(annotations, annotations)


def test_a_run_that_gets_no_better_stops_early_and_is_finished(
    single: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_evaluations(monkeypatch, [0.25, 0.5, 0.5, 0.375])
    config = tiny_config(tmp_path, single, train__epochs=30, train__early_stop_patience=2)
    assert train(config, tmp_path / "run")["AP"] == 0.5
    assert "stopped early: 2 evaluations without a better AP" in capsys.readouterr().out
    state = last_checkpoint(tmp_path / "run")
    assert (state.step, state.finished) == (4, True)
    assert train(config, tmp_path / "run", resume="auto")["AP"] == 0.5


def test_patience_begins_when_something_is_found(
    single: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_evaluations(monkeypatch, [0.0, 0.0, 0.0, 0.25, 0.25, 0.5])
    config = tiny_config(tmp_path, single, train__epochs=6, train__early_stop_patience=2)
    assert train(config, tmp_path / "run")["AP"] == 0.5


def test_patience_without_a_val_set_is_a_warning(
    single: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, single, **SHORT, data__val=None, train__early_stop_patience=2)
    train(config, tmp_path / "run")
    assert "train.early_stop_patience has no effect without data.val" in capsys.readouterr().out


def test_the_last_epoch_is_evaluated_even_if_it_is_not_its_turn(single: TinyData, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, single, train__epochs=3, eval__every_epochs=2), tmp_path / "run")
    assert [r["epoch"] for r in records(tmp_path / "run") if "split" in r] == [2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__augment": [{"HorizontalFlop": {}}]}, "HorizontalFlop"),
        ({"model__norm": "sync_bn"}, "sync_bn on a CPU"),
        ({"data__train": None}, "data.train must name images"),
    ],
)
def test_a_mistake_leaves_nothing_that_the_next_attempt_takes_for_a_run(
    settings: dict[str, Any], message: str, data: TinyData, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            train(tiny_config(tmp_path, data, **settings), tmp_path / "run")


@pytest.mark.parametrize("classes", [{"disc": 1, "Bar": 2, "hexagon": 5}, {"apple": 1}])
def test_fine_tuning_loads_the_weights_that_match_and_reports_them(
    classes: dict[str, int],
    whole: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so that the table is not folded
    annotations = write_coco(tmp_path / "new.json", 4, seed=3, classes=classes)
    source = whole.out / "checkpoints" / "last.pt"
    config = tiny_config(
        tmp_path, TinyData(annotations, annotations), **SHORT, data__val=None, train__init_from=str(source),
        optim__lr=1e-12, optim__warmup_steps=0,
    )  # fmt: skip
    train(config, tmp_path / "run")
    table = capsys.readouterr().out
    assert "weights loaded from" in table
    new, old = last_checkpoint(tmp_path / "run"), load_checkpoint(source)
    assert new.categories.names == tuple(classes)
    assert old.ema is not None
    for name, weights in new.model.items():
        if not name.startswith("cls_subnet.predictor."):
            assert torch.allclose(weights, old.ema[name], atol=1e-6), f"{name} must come from the averaged weights"
    bias = torch.unflatten(new.model["cls_subnet.predictor.bias"], 0, (9, len(classes)))
    reference = torch.unflatten(old.ema["cls_subnet.predictor.bias"], 0, (9, 3))
    prior = -torch.log(torch.tensor((1 - 0.01) / 0.01)).expand(9)
    shared = {"disc": 0, "Bar": 2}
    for label, name in enumerate(classes):
        expected = reference[:, shared[name]] if name in shared else prior
        assert torch.allclose(bias[:, label], expected, atol=1e-6), name
    assert (("of the same name: disc" in table) and ("Bar <- bar" in table)) == ("disc" in classes)
    assert "new, start from the prior" in table


def test_fine_tuning_needs_no_word_about_the_network(whole: Run, data: TinyData, tmp_path: Path) -> None:
    """It is the checkpoint's: in the run, when it is resumed (the checkpoint having been deleted), and when it is
    scored."""
    source = tmp_path / "source.pt"
    source.write_bytes((whole.out / "checkpoints" / "last.pt").read_bytes())
    path = write_config(tmp_path / "c.yaml", data, **SHORT, train__init_from=str(source))
    values = yaml.safe_load(path.read_text())
    reference = {**values.pop("model"), "backbone_weights": "imagenet"}  # not set, and not used
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    train(config, tmp_path / "run")
    state = last_checkpoint(tmp_path / "run")
    assert state.config.model == config_from_dict({"model": reference}, "x").model
    source.unlink()
    assert train(config, tmp_path / "run", resume="auto")["AP"] >= 0
    score_checkpoint(config, tmp_path / "run/checkpoints/best.pt", split="val", output_dir=tmp_path / "scored")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__backbone": "resnet34"}, "model.backbone: resnet34 in the config, resnet18 in the checkpoint"),
        ({"model__norm": "bn"}, "model.norm: bn in the config, gn in the checkpoint"),
        ({"model__head": {"depth": 1, "norm": "gn"}}, "model.head.norm: gn in the config, none in the checkpoint"),
        ({"model__norm_eps": 1e-3}, "model.compat.norm_eps: 0.001 in the config, 1e-05 in the checkpoint"),
        ({"model__channel_order": "bgr"}, "model.compat.channel_order: bgr in the config, rgb in the checkpoint"),
        ({"model__p6_from": "p5"}, "model.compat.p6_from: p5 in the config, c5 in the checkpoint"),
        ({"model__relu_before_p7": False}, "model.compat.relu_before_p7: False in the config, True in the checkpoint"),
    ],
)
def test_fine_tuning_a_network_of_another_build_is_refused(
    settings: dict[str, Any], message: str, whole: Run, data: TinyData, tmp_path: Path
) -> None:
    source = str(whole.out / "checkpoints" / "last.pt")
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(tiny_config(tmp_path, data, **SHORT, **settings, train__init_from=source), tmp_path / "run")


def test_half_precision_trains(data: TinyData, tmp_path: Path) -> None:
    """fp16 on a CPU is slow but the same code as on a GPU: scaled losses, skipped steps, a saved scaler."""
    one = write_coco(tmp_path / "one.json", 2, seed=4)
    config = tiny_config(
        tmp_path, TinyData(one, one), **SHORT, train__precision="fp16", data__val=None, data__min_size=32
    )
    train(config, tmp_path / "run")
    state = last_checkpoint(tmp_path / "run")
    assert state.scaler is not None
    assert state.scaler["scale"] > 0
    assert all(torch.isfinite(t).all() for t in state.model.values())


def test_images_that_vanish_during_a_run_do_not_end_it_under_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of training, one of evaluation, after all was checked; also where images are drawn."""
    data = write_tiny_data(tmp_path)
    settings: dict[str, Any] = {
        "data__on_error": "skip", "train__images_every_epochs": 1, "postprocess__score_thresh": 0.0,
    }  # fmt: skip
    config = tiny_config(tmp_path, data, **SHORT, **settings)
    summarize = preflight_module.summarize

    def summarize_and_remove(*arguments: Any, **named: Any) -> None:
        summarize(*arguments, **named)
        for file in data:
            next(images_of(file).glob("0010.png")).unlink()

    monkeypatch.setattr(run_module, "summarize", summarize_and_remove)
    monkeypatch.setattr(run_module, "self_check", lambda *_, **__: "")
    assert train(config, tmp_path / "run")["AP"] >= 0
    assert capsys.readouterr().err.count("0010.png: no such file; skipped") == 2


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_folder_that_vanishes_during_a_run_ends_it_even_under_skip(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would continue without data to learn from, or score nothing, and call that a success."""
    data = TinyData(*(write_coco(tmp_path / f"{name}.json", 11, seed=1) for name in ("train", "val")))
    config = tiny_config(tmp_path, data, data__on_error="skip")
    summarize = preflight_module.summarize

    def summarize_and_remove(*arguments: Any, **named: Any) -> None:
        summarize(*arguments, **named)
        shutil.rmtree(tmp_path / which)

    monkeypatch.setattr(run_module, "summarize", summarize_and_remove)
    monkeypatch.setattr(run_module, "self_check", lambda *_, **__: "")
    with pytest.raises(
        DatasetError, match=f"of the 11 images of .*{which}.json cannot be read, for example .*{which}/0"
    ) as caught:
        train(config, tmp_path / "run")
    count = int(str(caught.value).split()[0])
    assert 5 < count <= 11
    assert ("--resume auto" in str(caught.value)) == (which == "train")


def test_one_broken_image_is_one_however_often_it_is_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only one of its class, which class-balanced sampling shows again and again, and the only one that is
    evaluated."""
    annotations = write_coco(tmp_path / "train.json", 24, seed=1, classes={"disc": 3})
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 9, "name": "bar"})
    for box in content["annotations"]:
        if box["image_id"] == content["images"][0]["id"]:
            box["category_id"] = 9
    annotations.write_text(json.dumps(content))
    config = tiny_config(
        tmp_path, TinyData(annotations, annotations), **SHORT, data__on_error="skip", data__sampling="class_balanced",
        train__loss_images=1, train__loss_every_epochs=1, postprocess__score_thresh=0.0,
    )  # fmt: skip
    summarize = preflight_module.summarize

    def summarize_and_remove(*arguments: Any, **named: Any) -> None:
        summarize(*arguments, **named)
        (images_of(annotations) / content["images"][0]["file_name"]).unlink()

    monkeypatch.setattr(run_module, "summarize", summarize_and_remove)
    monkeypatch.setattr(run_module, "self_check", lambda *_, **__: "")
    train(config, tmp_path / "run")
    assert re.search(r"each 0\.52 to 12 times", capsys.readouterr().out)


def test_errors_that_need_no_data_come_before_the_data_are_checked(data: TinyData, tmp_path: Path) -> None:
    nowhere = {"images": "/nowhere", "annotations": "/nowhere.json"}
    config = tiny_config(tmp_path, data, data__train=nowhere, data__augment=[{"HorizontalFlop": {}}])
    with pytest.raises(ConfigError, match="HorizontalFlop"):
        train(config, tmp_path / "run")
    crop = tiny_config(tmp_path, data, data__augment=[{"RandomCrop": {"height": 600, "width": 600}}])
    require_settings(crop, fresh=True)  # how large the images are is not known yet
    missing = str(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match=r"none\.pt"):
        train(tiny_config(tmp_path, data, data__train=nowhere, model__backbone_weights=missing), tmp_path / "run")


def test_all_sets_are_checked_before_one_is_refused(data: TinyData, tmp_path: Path) -> None:
    def broken(name: str) -> dict[str, str]:
        annotations = write_coco(tmp_path / f"{name}.json", 3, seed=1)
        next(images_of(annotations).iterdir()).unlink()
        return split(annotations)

    config = tiny_config(tmp_path, data, data__verify="header", data__train=broken("one"), data__test=broken("two"))
    with pytest.raises(DatasetError) as caught:
        train(config, tmp_path / "run")
    assert all(str(caught.value).count(f"{name}.json") >= 1 for name in ("one", "two"))
    assert "val.json" not in str(caught.value)
    assert (tmp_path / "run/problems_train.tsv").read_text().startswith("missing image")
    assert (tmp_path / "run/problems_test.tsv").read_text().startswith("missing image")
