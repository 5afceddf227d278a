"""How much of a step fits into memory, and the room for images."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detector import distributed
from detector.config_yaml import load_config
from detector.errors import ConfigError, RunError
from detector.evaluation.dataset_loop import eval_batch_size
from detector.evaluation.score import score_checkpoint
from detector.losses import RetinaNetLoss
from detector.memory import SPARE, free_memory
from detector.memory import keep_freed_memory as keep_freed_memory_here
from detector.models import build_model
from detector.training import image_cache
from detector.training import micro_batch as memory
from detector.training.setup import build_learner
from detector.training.train import train
from tests.conftest import Run
from tests.tiny import TinyData, differing, last_checkpoint, records, tiny_config

SHORT: dict[str, Any] = {"train__epochs": 1, "data__val": None}


def test_with_memory_to_spare_all_images_go_at_once(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, micro_batch in (("auto", "auto"), ("all", None)):
        train(tiny_config(tmp_path, data, **SHORT, train__micro_batch=micro_batch), tmp_path / name)
    auto, wanted = last_checkpoint(tmp_path / "auto"), last_checkpoint(tmp_path / "all")
    assert auto.micro_batch == 4
    assert all(torch.equal(auto.model[key], value) for key, value in wanted.model.items())
    assert records(tmp_path / "auto") == records(tmp_path / "all")
    assert "4 fit" in capsys.readouterr().out


def test_with_little_memory_a_step_is_done_in_parts(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With norm bn, whose statistics the trial must leave alone, and which depends on the parts."""
    settings: dict[str, Any] = {**SHORT, "model__norm": "bn"}
    config = tiny_config(tmp_path, data, **settings, train__micro_batch="auto")
    asked = []

    def peak_of(work: Any, device: torch.device) -> int:
        asked.append(work.args[-1])
        work()
        return {1: 240, 2: 480}[work.args[-1]]

    monkeypatch.setattr(memory, "peak_of", peak_of)
    weights = 4 * sum(p.numel() for p in build_model(config.model, 3).parameters() if p.requires_grad)
    monkeypatch.setattr(memory, "free_memory", lambda: int((weights + 510) / (1 - SPARE)) + 1)
    train(config, tmp_path / "auto")
    assert asked == [1, 2]
    printed = capsys.readouterr()
    assert "the 4 images of a step are processed in 2 micro-batches" in printed.out
    assert "statistics over 2 images, not 4" in printed.out + printed.err
    train(tiny_config(tmp_path, data, **settings, train__micro_batch=2), tmp_path / "two")
    ours, wanted = last_checkpoint(tmp_path / "auto"), last_checkpoint(tmp_path / "two")
    assert ours.micro_batch == 2
    assert all(torch.equal(ours.model[key], value) for key, value in wanted.model.items())


def test_a_resumed_run_keeps_to_what_was_found(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for more now: the sums must be those of the run that it continues."""
    monkeypatch.setattr(memory, "peak_of", None)
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto")
    state: Any = SimpleNamespace(micro_batch=3, fitting_micro_batch=None)
    log: Any = SimpleNamespace(info=print)
    planner: Any = SimpleNamespace(largest_canvas=lambda: (96, 96))
    nothing: Any = None
    assert memory.resolve_micro_batch(config, nothing, state, planner, nothing, log) == 3


def test_two_images_are_not_tried_where_one_nearly_fills_the_memory(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that asked for both would be ended by the system."""
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto")
    asked = []

    def peak_of(work: Any, _: torch.device) -> int:
        asked.append(work.args[-1])
        return 300

    monkeypatch.setattr(memory, "peak_of", peak_of)
    weights = 4 * sum(p.numel() for p in build_model(config.model, 3).parameters() if p.requires_grad)
    monkeypatch.setattr(memory, "free_memory", lambda: int((weights + 590) / (1 - SPARE)) + 1)
    train(config, tmp_path / "out")
    assert asked == [1]
    assert last_checkpoint(tmp_path / "out").micro_batch == 1


def test_it_is_tried_as_it_is_trained_and_moves_no_statistics(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms with fixed statistics are folded in bf16 and keep nothing for their gradient, so eval() would take less."""
    config = tiny_config(tmp_path, data, **SHORT, model__norm="bn", train__precision="bf16", train__micro_batch="auto")
    modes, statistics, real = [], [], memory._trial_step

    def tried(run: Any, *arguments: Any) -> None:
        modes.append(run.model.backbone.bn1.training)
        real(run, *arguments)
        statistics.append((run, run.model.backbone.bn1.num_batches_tracked.item()))

    def first_step(run: Any, *_: Any) -> None:
        assert run.model.backbone.bn1.num_batches_tracked.item() == 0
        assert run.model.backbone.bn1.running_mean.abs().max() == 0
        assert all(p.grad is None for p in run.model.parameters())
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "_trial_step", tried)
    monkeypatch.setattr("detector.training.train.train_step", first_step)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out")
    assert modes == [True, True]
    assert [count for _, count in statistics] == [1, 2], "or else there was nothing to put back"


def test_the_images_to_be_kept_count_as_taken(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto", data__cache_gb=0.01)
    monkeypatch.setattr(memory, "peak_of", lambda *_: 100_000)
    weights = 4 * sum(p.numel() for p in build_model(config.model, 3).parameters() if p.requires_grad)
    monkeypatch.setattr(memory, "free_memory", lambda: int((weights + 100_000) / (1 - SPARE)) + 100_000)
    with pytest.raises(RunError, match="1 image of 96 x 96 pixels"):
        train(config, tmp_path / "out")
    train(tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto"), tmp_path / "without")


def test_statistics_that_are_exchanged_cannot_be_tried_alone(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto", model__norm="sync_bn")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    nothing: Any = None
    with pytest.raises(
        ConfigError, match=r"train\.micro_batch must be a number with model\.norm sync_bn in 2 processes"
    ):
        memory.resolve_micro_batch(config, nothing, nothing, nothing, nothing, nothing)


def test_evaluation_takes_no_more_images_at_once_than_training(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_largest_that_fits", lambda *_: (2, "as measured"))
    asked = []

    def full(_: Any, __: Any, config: Any, **___: Any) -> Any:
        asked.append(eval_batch_size(config))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("detector.training.validation.evaluate_model", full)
    config = tiny_config(tmp_path, data, train__epochs=1, train__micro_batch="auto")
    with pytest.raises(
        RunError,
        match=r"in evaluation: 2 images did not fit; set eval\.batch_size=1, eval\.loss=false or .*, with --resume",
    ):
        train(config, tmp_path / "out")
    assert asked == [2]
    monkeypatch.undo()
    train(load_config(tmp_path / "tiny.yaml", ["eval.batch_size=1"]), tmp_path / "out", resume="auto")
    assert last_checkpoint(tmp_path / "out").finished
    score_checkpoint(config, tmp_path / "out" / "checkpoints" / "best.pt", split="val", output_dir=tmp_path / "scored")


def test_a_run_may_resume_with_smaller_micro_batches_and_warns(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the out-of-memory message of several processes suggests, which cannot repeat the step by themselves."""
    forward, steps = RetinaNetLoss.forward, []

    def full(*arguments: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments, **named)

    def built(*arguments: Any, **named: Any) -> Any:
        return replace(build_learner(*arguments, **named), processes=2)

    monkeypatch.setattr(RetinaNetLoss, "forward", full)
    monkeypatch.setattr("detector.training.run.build_learner", built)
    config = tiny_config(tmp_path, data, **SHORT, train__checkpoint_every_steps=1)
    with pytest.raises(
        RunError,
        match=r"out of memory at step 3: .*set train\.micro_batch=2, .*with --resume auto; or in a new run data",
    ):
        train(config, tmp_path / "out")
    monkeypatch.undo()
    train(load_config(tmp_path / "tiny.yaml", ["train.micro_batch=1"]), tmp_path / "out", resume="auto")
    printed = capsys.readouterr()
    assert "train.micro_batch was None, is 1: sums round differently" in printed.out + printed.err
    assert last_checkpoint(tmp_path / "out").finished


@pytest.mark.parametrize("limits", [("max", "max"), ("1000", "max"), ("max", "1000")])
def test_free_memory_is_that_of_the_container_without_what_files_keep_there(
    limits: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits of a group and of the one above it; 900 of 1000 are taken, 500 of them by files, of which 100 are shared
    memory."""
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n", "/proc/self/cgroup": "0::/outer/inner\n"}
    for limit, group in zip(limits, ("/outer/inner", "/outer"), strict=True):
        files[f"/sys/fs/cgroup{group}/memory.max"] = f"{limit}\n"
        files[f"/sys/fs/cgroup{group}/memory.current"] = "900\n"
        files[f"/sys/fs/cgroup{group}/memory.stat"] = "anon 400\nfile 500\nshmem 100\n"

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_memory() == (500 if "1000" in limits else 8192)


def test_an_image_that_does_not_fit_alone_is_an_error_before_the_first_step(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto")
    with pytest.raises(
        RunError,
        match=r"step 1: 1 image of 96 x 96 pixels did not fit; set train.checkpoint_activations=true",
    ):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_kept_images_do_not_change_a_run(whole: Run, data: TinyData, tmp_path: Path) -> None:
    config = load_config(whole.config, ["data.cache_gb=0.01", "data.num_workers=1"])
    train(config, tmp_path / "run")
    assert differing(last_checkpoint(tmp_path / "run"), last_checkpoint(whole.out)) == []


def test_a_cache_that_leaves_no_room_is_refused(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"data\.cache_gb must leave room for the network, got 0.0 of 0.0 GB"):
        train(tiny_config(tmp_path, data, **SHORT, data__cache_gb=0.01), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.cache_gb must fit into data\.cache_folder .*nowhere.*No such file"):
        train(
            tiny_config(tmp_path, data, **SHORT, data__cache_gb=0.01, data__cache_folder=str(tmp_path / "nowhere")),
            tmp_path / "out",
        )


FAULTS = """
import resource, torch
from detector.memory import keep_freed_memory

def fault_share():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(5_000_000) for _ in range(20)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 400e6

by_itself = fault_share()
keep_freed_memory()
print(by_itself, fault_share())
"""
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="only glibc can be configured to keep memory")
def test_what_a_step_gives_back_is_kept_for_the_next() -> None:
    """Of 20 blocks of 20 MB each, asked for again and again: the share of pages that come back empty."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=plain, capture_output=True, text=True, check=True)
    by_itself, kept = map(float, done.stdout.split())
    assert by_itself > 0.5
    assert kept < 0.01


@pytest.mark.parametrize("libc", ["glibc", "musl"])
@pytest.mark.parametrize("key", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "HOME"])
def test_malloc_settings_of_the_environment_are_respected(libc: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "environ", {key: "1"})
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *what: calls.append(what)))
    keep_freed_memory_here()
    assert bool(calls) == (libc == "glibc" and key == "HOME")
