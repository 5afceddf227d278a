"""Kill a real small run at any moment: resumed, it ends bit for bit as the one left alone.

Cells of the BCCD photographs with EMA, accumulation, several scales, augmentation and two loader workers. Each case is
seeded: it chooses the signal and the kind of moment by its number, and the moment itself at random.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.config_yaml import load_config
from detector.training.train import train
from tests.tiny import (
    REPO,
    differing,
    last_checkpoint,
    ranks,
    records,
    start_tool,
    wait,
)

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)

IMAGES, VAL_IMAGES = 22, 8

SETTINGS = [
    "train.epochs=2", "train.batch_size=4", "train.micro_batch=2", "train.checkpoint_every_steps=2",
    "train.precision=fp32", "train.device=cpu", "train.log_every=1", "train.images_every_epochs=0",
    "train.ema={decay: 0.9}", "data.min_size=[64,80,96]", "data.max_size=128", "data.num_workers=2",
    "data.verify=none", "data.test=null", "model.backbone_weights=none", "model.fpn_channels=64",
    "model.head={depth: 1, norm: gn}", "optim.warmup_steps=2",
]  # fmt: skip


class CellRun(NamedTuple):
    """The arguments of a run and its folder, left alone to its end."""

    argv: list[str]
    out: Path
    processes: int


def subset(source: Path, target: Path, count: int) -> Path:
    """Write the first images of a COCO file, with their annotations, to another file."""
    content = json.loads(source.read_text())
    images = content["images"][:count]
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    target.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    return target


def arguments(shared: Path, folder: Path) -> list[str]:
    cells = shared / "datasets" / "bccd"
    if not cells.is_dir():
        pytest.skip(f"no BCCD images in {cells}")
    overrides = list(SETTINGS)
    for split, count in (("train", IMAGES), ("val", VAL_IMAGES)):
        annotations = subset(cells / "annotations" / f"{split}.json", folder / f"{split}.json", count)
        overrides += [f"data.{split}={{images: {cells / 'images'}, annotations: {annotations}}}"]
    return ["--config", str(REPO / "configs" / "bccd_r18.yaml"), *overrides]


@pytest.fixture(scope="module")
def cells(shared: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> CellRun:
    folder = tmp_path_factory.mktemp("cells")
    argv = arguments(shared, folder)
    train(load_config(Path(argv[1]), argv[2:]), folder / "run")
    return CellRun(argv, folder / "run", processes=1)


@pytest.fixture(scope="module")
def cells_of_two(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> CellRun:
    folder = tmp_path_factory.mktemp("two")
    argv = [*arguments(shared, folder), "data.num_workers=0"]
    run = CellRun(argv, folder / "run", processes=2)
    processes = start(run, run.out, folder / "log")
    assert wait(processes, folder / "log", seconds=300) == [0, 0], (folder / "log").read_text()[-3000:]
    return run


def start(run: CellRun, out: Path, log: Path, *more: str) -> list[ForkServerProcess]:
    argv = [*run.argv, "--output-dir", str(out), *more]
    environments: list[dict[str, str]] = ranks(2) if run.processes == 2 else [{}]
    return [start_tool("train", argv, log, environment) for environment in environments]


def last_record(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / "metrics.jsonl").read_bytes().splitlines()[-1])
        return found
    except (OSError, ValueError, IndexError):
        return {}


def moments(out: Path, rng: random.Random, length: float) -> dict[str, Callable[[], bool]]:
    """Kinds of moments to kill at: conditions that are polled."""
    last, partial = out / "checkpoints" / "last.pt", out / "checkpoints" / ".last.pt.tmp"
    best = out / "checkpoints" / ".best.pt.tmp"
    wanted = rng.randrange(1, 6)
    seen: list[int] = []

    def replaced() -> bool:
        """last.pt was renamed into its place for the `wanted`th time, and the next step has not begun."""
        inode = last.stat().st_ino if last.exists() else None
        if inode is not None and inode not in seen[-1:]:
            seen.append(inode)
        return len(seen) >= min(wanted, 4)

    steps = -(-IMAGES // 4)
    begun: list[float] = []
    delay = rng.uniform(0, length)

    def some_time() -> bool:
        if not begun and (out / "config.yaml").exists():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] >= delay

    return {
        "at a random time": some_time,
        "while it writes a checkpoint": lambda: partial.exists() and len(seen) >= 0,
        "after a rename": replaced,
        "while it evaluates": lambda: last_record(out).get("step") == steps and "split" not in last_record(out),
        "while it writes the best": best.exists,
        "after a step": lambda: last_record(out).get("step", 0) >= wanted,
    }


def kill_and_resume(case: int, run: CellRun, folder: Path, *, length: float = 3.0) -> None:
    """Kill a run once, twice or three times at moments of different kinds, resume it, and compare."""
    rng = random.Random(case)
    out, log = folder / "run", folder / "log"
    report = []
    for attempt in range(1 + case % 3):
        processes = start(run, out, log, *(["--resume", "auto"] if attempt else []))
        kinds = moments(out, rng, length)
        kind = list(kinds)[(case + attempt) % len(kinds)]
        signum = SIGNALS[(case // len(kinds) + attempt) % len(SIGNALS)]
        victim = processes[rng.randrange(run.processes)]
        until = time.monotonic() + 300
        while all(p.is_alive() for p in processes) and not kinds[kind]():
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.0005)
        if victim.is_alive() and victim.pid is not None:
            os.kill(victim.pid, signum)
        victim.join(60)
        for other in processes:  # which torchrun ends when one has ended
            if other is not victim and other.is_alive() and other.pid is not None:
                os.kill(other.pid, signal.SIGTERM)
                other.join(20)
                other.kill()
        codes = wait(processes, log, seconds=300)
        report.append(f"{signum.name} {kind}: exit codes {codes}, step {last_record(out).get('step')}")
        assert all(code in (0, -signum, 128 + signum, -signal.SIGKILL) or run.processes == 2 for code in codes), report
    assert wait(start(run, out, log, "--resume", "auto"), log, seconds=300) == [0] * run.processes, log.read_text()[
        -3000:
    ]
    assert_bit_equal(out, run.out, f"case {case}: {report}")


def assert_bit_equal(out: Path, alone: Path, what: str) -> None:
    """Weights, averages, optimizer, results, records and TensorBoard's scalars; and nothing left behind."""
    one, other = last_checkpoint(out), last_checkpoint(alone)
    assert (one.step, one.best_ap, one.finished) == (other.step, other.best_ap, other.finished), what
    assert differing(one, other) == [], what
    assert records(out) == records(alone), what
    assert (out / "metrics.json").read_bytes() == (alone / "metrics.json").read_bytes(), what
    assert scalars(out) == scalars(alone), what
    assert [path.name for path in out.rglob(".*")] == [], what


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's values by tag and step, without those of the clock."""
    events = EventAccumulator(str(out), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("train/images_per_s", "train/data_wait")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def test_a_killed_run_ends_bit_equal_to_one_left_alone(cells: CellRun, tmp_path: Path) -> None:
    kill_and_resume(0, cells, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", range(54))
def test_the_kill_matrix(case: int, cells: CellRun, tmp_path: Path) -> None:
    """Each of three signals at each of six kinds of moments, three times, once to three times in a row."""
    kill_and_resume(case, cells, tmp_path)


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_end_bit_equal(cells_of_two: CellRun, tmp_path: Path) -> None:
    kill_and_resume(1, cells_of_two, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", range(18))
def test_the_kill_matrix_of_two_ranks(case: int, cells_of_two: CellRun, tmp_path: Path) -> None:
    kill_and_resume(case, cells_of_two, tmp_path)
