"""The command lines: what they print, what they write, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detector.atomic import read_json
from detector.config_yaml import load_config
from detector.datasets.workers import end_workers
from detector.training.train import train
from tests.tiny import REPO, TinyData, images_of, write_coco, write_config, write_tiny_data
from tools import analyze_loss as analyze_loss_tool
from tools import eval as eval_tool
from tools import plot as plot_tool
from tools import predict as predict_tool
from tools import train as train_tool


class Setup(NamedTuple):
    """A trained run and what it was trained on."""

    folder: Path
    data: TinyData
    config: Path
    run: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("tools")
    data = write_tiny_data(folder)
    test = {"images": str(images_of(data.train)), "annotations": str(data.train)}
    # A low threshold, so that a model that has hardly learned anything yet finds something to compare.
    settings = {"postprocess__score_thresh": 0.001, "data__test": test, "train__epochs": 1, "eval__batch_size": 1}
    config = write_config(folder / "tiny.yaml", data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(load_config(config), folder / "run")
        yield Setup(folder, data, config, folder / "run")


def read(path: Path) -> Any:
    return read_json(path)


def score(setup: Setup, out: Path, *more: str) -> int:
    return eval_tool.main(["--config", str(setup.config), "--output-dir", str(out), *more])


def test_a_checkpoint_scores_what_its_run_reported(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(setup, tmp_path, "--checkpoint", str(setup.checkpoint)) == 0
    trained = read(setup.run / "metrics.json")
    assert read(tmp_path / "metrics.json") == {k: v for k, v in trained.items() if k != "test"}
    assert "AP50" in capsys.readouterr().out
    assert score(setup, tmp_path / "test", "--checkpoint", str(setup.checkpoint), "--split", "test") == 0
    assert read(tmp_path / "test" / "metrics.json") == trained["test"]


def test_a_results_file_scores_as_the_checkpoint_that_wrote_it_without_any_image(setup: Setup, tmp_path: Path) -> None:
    assert score(setup, tmp_path / "one", "--checkpoint", str(setup.checkpoint)) == 0
    results = tmp_path / "one" / "detections.json"
    assert len(read(results)) > 0
    assert list(read(results)[0]) == ["image_id", "category_id", "bbox", "score"]
    nowhere = "data.val.images=/nowhere/at/all"
    assert score(setup, tmp_path / "two", "--detections", str(results), nowhere) == 0
    assert read(tmp_path / "two" / "metrics.json") == read(tmp_path / "one" / "metrics.json")


def test_an_empty_results_file_scores_zero(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    assert score(setup, tmp_path / "out", "--detections", str(tmp_path / "none.json")) == 0
    assert read(tmp_path / "out" / "metrics.json")["AP"] == 0.0


def test_a_checkpoint_that_moved_needs_nothing_beside_it(setup: Setup, tmp_path: Path) -> None:
    alone = tmp_path / "alone.pt"
    alone.write_bytes(setup.checkpoint.read_bytes())
    image = next(images_of(setup.data.val).glob("*.png"))
    argv = ["--checkpoint", str(alone), str(image), "--output-dir", str(tmp_path / "out")]
    assert predict_tool.main(argv) == 0
    assert (tmp_path / "out" / "detections.json").exists()
    assert (tmp_path / "out" / f"{image.stem}.jpg").exists()


def other_classes(folder: Path) -> Path:
    return write_coco(folder / "other.json", 2, seed=0, classes={"square": 7, "disk": 3, "bar": 90})


def mistakes(setup: Setup, folder: Path) -> dict[str, tuple[Any, list[str], list[str]]]:
    """Tool, arguments, and the parts of its error message."""
    config, checkpoint, out = str(setup.config), str(setup.checkpoint), str(folder / "out")
    damaged, foreign, results = folder / "damaged.pt", folder / "foreign.pt", folder / "results.json"
    damaged.write_bytes(setup.checkpoint.read_bytes()[:5000])
    torch.save({"w": torch.ones(2)}, foreign)
    results.write_text('[{"image_id": 999, "category_id": 0, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    (folder / "typo.yaml").write_text("optim: {learning_rate: 0.1}\ntrain: {epoch: 3}\n")
    other = other_classes(folder)
    t, e, p = train_tool, eval_tool, predict_tool
    here, scored = ["--output-dir", out], ["--config", config, "--output-dir", out]
    return {
        "config missing": (t, ["--config", str(folder / "no.yaml"), *here], ["no.yaml does not exist"]),
        "keys unknown": (
            t,
            ["--config", str(folder / "typo.yaml"), *here],
            ["optim.learning_rate: unknown key; did you mean optim.lr?", "did you mean train.epochs?", "typo.yaml:2"],
        ),
        "override malformed": (t, ["--config", config, *here, "train.epochs"], ["override must be key=value"]),
        "value wrong": (t, ["--config", config, *here, "train.epochs=0"], ["train.epochs", "command line"]),
        "annotations missing": (t, ["--config", config, *here, "data.train.annotations=no.json"], ["no.json"]),
        "images missing": (t, ["--config", config, *here, "data.train.images=nodir"], ["nodir",
        "no such image folder"]),
        "val has other classes": (
            t,
            ["--config", config, *here, f"data.val.annotations={other}", f"data.val.images={images_of(other)}"],
            ["disk", "disc"],
        ),
        "run exists": (t, ["--config", config, "--output-dir", str(setup.run)], ["already holds a run",
        "--resume auto"]),
        "init-from missing": (t, ["--config", config, *here, "--init-from", "no.pt"], ["no.pt does not exist"]),
        "init-from odd": (t, ["--config", config, *here, "--init-from", "my #2: x.pt"], ["my #2: x.pt does not exist"]),
        "resume missing": (t, ["--config", config, *here, "--resume", "no.pt"], ["no.pt does not exist"]),
        "output is a file": (t, ["--config", config, "--output-dir", str(damaged)], ["must be a folder to write in"]),
        "predictions into a file": (
            p, ["--checkpoint", checkpoint, str(REPO / "data/shapes/images/val"), "--output-dir", str(damaged)],
            ["must be a folder to write in"],
        ),
        "scores into a file": (
            e, ["--config", config, "--checkpoint", checkpoint, "--output-dir", str(damaged)],
            ["must be a folder to write in"],
        ),
        "weights missing": (t, ["--config", config, *here, "model.backbone_weights=no.pth"], ["no.pth"]),
        "checkpoint missing": (e, [*scored, "--checkpoint", "no.pt"], ["no.pt does not exist"]),
        "checkpoint damaged": (e, [*scored, "--checkpoint", str(damaged)], ["damaged.pt cannot be read"]),
        "checkpoint foreign": (e, [*scored, "--checkpoint", str(foreign)], ["must be a checkpoint written by"]),
        "model contradicts": (
            e,
            [*scored, "--checkpoint", checkpoint, "model.fpn_channels=64", "model.head.depth=2"],
            ["model.fpn_channels: 64 in the config, 32 in the checkpoint", "model.head.depth: 2 in the config, 1 in"],
        ),
        "split missing": (
            e, [*scored, "--checkpoint", checkpoint, "--split", "test", "data.test=null"],
            ["data.test must name images"],
        ),
        "data has other classes": (
            e,
            [*scored, "--checkpoint", checkpoint, f"data.val.annotations={other}",
            f"data.val.images={images_of(other)}"],
            ["disk", "disc"],
        ),
        "results missing": (e, [*scored, "--detections", "no.json"], ["no.json"]),
        "results foreign": (e, [*scored, "--detections", str(results)], ["image_id unknown", "999",
        "category_id unknown"]),
        "inputs missing": (p, ["--checkpoint", checkpoint, "no.jpg", *here], ["no.jpg: no file"]),
        "predictor missing": (p, ["--checkpoint", "no.pt", str(REPO / "data/shapes/images/val"), *here],
        ["no.pt does not"]),
        "cuda missing": (
            t, ["--config", config, *here, "train.device=cuda"], ["train.device must be cpu or auto on this machine"],
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "which",
    [
        "config missing", "keys unknown", "override malformed", "value wrong", "annotations missing", "images missing",
        "val has other classes", "run exists", "init-from missing", "init-from odd", "resume missing",
        "weights missing", "checkpoint missing", "checkpoint damaged", "checkpoint foreign", "model contradicts",
        "split missing",
        "data has other classes", "results missing", "results foreign", "inputs missing", "predictor missing",
        "cuda missing", "output is a file", "predictions into a file", "scores into a file",
    ],
)  # fmt: skip
def test_a_user_error_is_one_message_and_exit_code_2(
    which: str, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tool, argv, messages = mistakes(setup, tmp_path)[which]
    assert tool.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    for part in messages:
        assert part in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "config.yaml").exists(), "what failed to start is no run"


@pytest.mark.parametrize(
    ("tool", "argv"),
    [
        (train_tool, []),
        (train_tool, ["--config", "c.yaml", "--epochs", "3"]),
        (eval_tool, ["--config", "c.yaml"]),
        (eval_tool, ["--config", "c.yaml", "--checkpoint", "a", "--detections", "b"]),
        (predict_tool, ["--checkpoint", "a", "--output-dir", "b"]),
        (predict_tool, ["--checkpoint", "a", "--output-dir", "b", "--score-thresh", "30", "x.jpg"]),
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2(
    tool: Any, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(argv)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("tool", [train_tool, eval_tool, predict_tool, analyze_loss_tool])
def test_help_explains_the_arguments(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--output-dir" in text
    assert "usage:" in text


def test_an_unreadable_image_found_by_a_worker_is_reported_without_its_traceback(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tiny_data(tmp_path)
    next(images_of(data.val).glob("*.png")).write_bytes(b"")
    config = write_config(tmp_path / "c.yaml", data, data__num_workers=1)
    argv = ["--config", str(config), "--checkpoint", str(setup.checkpoint), "--output-dir", str(tmp_path / "out")]
    assert eval_tool.main(argv) == 2
    error = capsys.readouterr().err
    end_workers()
    assert "Traceback" not in error
    assert ".png: is empty" in error


def test_ctrl_c_before_training_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_tool, "load_config", interrupted)
    assert train_tool.main(["--config", "c.yaml"]) == 130


def test_a_fault_of_the_program_is_not_disguised_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(train_tool, "load_config", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        train_tool.main(["--config", "c.yaml"])


def test_overrides_may_stand_anywhere_on_the_command_line(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["optim.lr=-1", "--config", str(setup.config), "train.epochs=0", "--output-dir", "x", "train.seed=-1"]
    assert train_tool.main(argv) == 2
    error = capsys.readouterr().err
    assert all(key in error for key in ("optim.lr", "train.epochs", "train.seed")), "all mistakes at once"


def test_a_tool_runs_from_any_folder_without_the_package_installed(setup: Setup, tmp_path: Path) -> None:
    """By its path, from elsewhere, with nothing of ours on the Python path; relative paths are those of the caller."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    (tmp_path / "none.json").write_text("[]")
    command = [
        sys.executable,
        str(REPO / "tools" / "eval.py"),
        "--config",
        str(setup.config),
        "--detections",
        "none.json",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "eval_val" / "metrics.json")["AP"] == 0.0
    assert "AP50" in done.stdout


def test_a_run_whose_folder_contains_an_equals_sign_is_plotted_under_its_own_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, figure = tmp_path / "lr=0.01", tmp_path / "curves.svg"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"epoch": 1, "loss": 0.5}\n{"epoch": 1, "split": "val", "AP": 0.1, "AP50": 0.2}\n'
    )
    for text, label in ((str(run), "lr=0.01"), (f"baseline={run}", "baseline")):
        assert plot_tool.main(["runs", text, "--output", str(figure)]) == 0
        assert f"<!-- {label}: AP -->" in figure.read_text()
    assert plot_tool.main(["runs", str(tmp_path), "--output", str(figure)]) == 2


@pytest.mark.parametrize("command", ["losses", "runs"])
def test_help_of_the_plot_commands_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plot_tool.main([command, "--help"])
    assert ended.value.code == 0
    assert f"python tools/plot.py {command}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["train", "eval", "predict"])
def test_a_mistake_ends_a_real_process_with_2_and_no_traceback(tool: str, tmp_path: Path) -> None:
    argv = {
        "train": ["--config", "no.yaml"],
        "eval": ["--config", "no.yaml", "--checkpoint", "no.pt"],
        "predict": ["--checkpoint", "no.pt", "no.jpg", "--output-dir", "out"],
    }[tool]
    command = [sys.executable, str(REPO / "tools" / f"{tool}.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
