"""How much of a step fits into memory, and the room for pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detector.config import ConfigError, load_config
from detector.engine import memory
from detector.engine.errors import RunError
from detector.engine.train import train
from detector.models import build_model
from tests.engine.conftest import Run
from tests.tiny import TinyData, differing, last_checkpoint, records, tiny_config

SHORT: dict[str, Any] = {"train__epochs": 1, "data__val": None}


def test_with_memory_to_spare_all_pictures_go_at_once(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, micro_batch in (("auto", "auto"), ("all", None)):
        train(tiny_config(tmp_path, data, **SHORT, train__micro_batch=micro_batch), tmp_path / name)
    auto, wanted = last_checkpoint(tmp_path / "auto"), last_checkpoint(tmp_path / "all")
    assert auto.micro_batch == 4
    assert all(torch.equal(auto.model[key], value) for key, value in wanted.model.items())
    assert records(tmp_path / "auto") == records(tmp_path / "all")
    assert "4 at once" in capsys.readouterr().out


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
        return {1: 300, 2: 500}[work.args[-1]]

    monkeypatch.setattr(memory, "peak_of", peak_of)
    weights = 4 * sum(p.numel() for p in build_model(config.model, 3).parameters() if p.requires_grad)
    monkeypatch.setattr(memory, "free_memory", lambda: int((weights + 510) / (1 - memory.SPARE)) + 1)
    train(config, tmp_path / "auto")
    assert asked == [1, 2]
    said = capsys.readouterr()
    assert "4 pictures go through the network in 2 parts" in said.out
    assert "statistics of 2 pictures at once, not 4" in said.out + said.err
    train(tiny_config(tmp_path, data, **settings, train__micro_batch=2), tmp_path / "two")
    ours, wanted = last_checkpoint(tmp_path / "auto"), last_checkpoint(tmp_path / "two")
    assert ours.micro_batch == 2
    assert all(torch.equal(ours.model[key], value) for key, value in wanted.model.items())


def test_a_resumed_run_keeps_to_what_was_found(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for more now: the sums must be those of the run it goes on with."""
    monkeypatch.setattr(memory, "peak_of", None)
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto")
    run: Any = SimpleNamespace(config=config, state=SimpleNamespace(micro_batch=3), log=SimpleNamespace(info=print))
    planner: Any = SimpleNamespace(largest_canvas=lambda: (96, 96))
    assert memory.resolved_micro_batch(run, planner, 3) == 3


def test_a_picture_that_does_not_fit_alone_is_told_before_the_first_step(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    config = tiny_config(tmp_path, data, **SHORT, train__micro_batch="auto")
    with pytest.raises(
        RunError, match=r"1 picture of 96 x 96 pixels at once in step 1, and does not; set data.min_size below 64"
    ):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_kept_pictures_do_not_change_a_run(whole: Run, data: TinyData, tmp_path: Path) -> None:
    config = load_config(whole.config, ["data.cache_gb=0.01", "data.num_workers=1"])
    train(config, tmp_path / "run")
    assert differing(last_checkpoint(tmp_path / "run"), last_checkpoint(whole.out)) == []


def test_a_cache_that_leaves_no_room_is_refused(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"data\.cache_gb must leave room for the network, got 0.01 of 0.0 GB"):
        train(tiny_config(tmp_path, data, **SHORT, data__cache_gb=0.01), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.cache_gb must fit into data\.cache_folder .*nowhere.*No such file"):
        train(
            tiny_config(tmp_path, data, **SHORT, data__cache_gb=0.01, data__cache_folder=str(tmp_path / "nowhere")),
            tmp_path / "out",
        )
