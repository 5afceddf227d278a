"""The front door: names that are stable, imports that are cheap, commands that fail fast."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import detector
import detector.api
from detector.errors import ConfigError
from tests.tiny import REPO, TinyData, images_of, write_config

HEAVY = ("torch", "torchvision", "cv2", "albumentations", "tensorboard", "matplotlib", "optuna", "scipy")


def modules_after(code: str, cwd: Path) -> set[str]:
    """The heavy modules that a new interpreter has loaded after running some code."""
    code += f"\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    assert modules_after("import detector; dir(detector)", tmp_path) == set()


def test_every_public_name_is_there_and_documented() -> None:
    for name in detector._MODULES:
        assert name in dir(detector)
        assert getattr(detector, name).__doc__
    text = (REPO / "docs" / "api.md").read_text()
    assert all(f"`{name}" in text for name in detector._MODULES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trane'"):
        _ = detector.trane


TOOLS = sorted(path.stem for path in (REPO / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS)
def test_help_loads_nothing_heavy_and_shows_examples(tool: str, tmp_path: Path) -> None:
    call = f"try:\n  {tool}.main(['--help'])\nexcept SystemExit as stop:\n  assert stop.code == 0"
    code = f"from tools import {tool}\n{call}"
    assert modules_after(code, tmp_path) == set()
    env = {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "80"}
    command = [sys.executable, str(REPO / "tools" / f"{tool}.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=True).stdout
    assert text.startswith("usage: ")
    assert "examples:" in text
    assert f"python tools/{tool}.py" in text


@pytest.mark.parametrize(
    ("tool", "argv", "message"),
    [
        ("train", ["--config", "c.yaml", "learning_rate=1"], "did you mean optim.lr"),
        ("train", ["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        ("eval", ["--config", "nowhere.yaml", "--checkpoint", "x.pt"], "config file nowhere.yaml does not exist"),
        ("eval", ["--config", "c.yaml", "--checkpoint", "nowhere.pt"], "nowhere.pt does not exist"),
        ("predict", ["--checkpoint", "nowhere.pt", ".", "--output-dir", "out"], "nowhere.pt does not exist"),
        ("analyze_loss", ["--config", "c.yaml", "--checkpoint", "nowhere.pt"], "nowhere.pt does not exist"),
    ],
)
def test_mistakes_in_a_command_or_config_cost_no_import_of_torch(
    tool: str, argv: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  train: {images: a, annotations: b.json}\n")
    (tmp_path / "image.jpg").touch()
    code = (
        "import contextlib, io\nerr = io.StringIO()\n"
        f"from tools import {tool}\n"
        f"with contextlib.redirect_stderr(err):\n  assert {tool}.main({argv!r}) == 2\n"
        f"assert {message!r} in err.getvalue(), err.getvalue()"
    )
    assert modules_after(code, tmp_path) == set()


def test_the_package_is_a_command(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "detector", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    assert "train a detector from a YAML config" in run("--help").stdout
    assert run("--version").stdout.strip() == detector.__version__
    assert run("trane").returncode == 2
    wrong = run("train", "--config", "nowhere.yaml")
    assert (wrong.returncode, wrong.stderr[:6]) == (2, "error:")


@pytest.mark.usefixtures("one_thread", "short_network")
def test_train_evaluate_and_detect_in_python(data: TinyData, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", data, train__epochs=1)
    metrics = detector.train(config, tmp_path / "run", overrides=["train.seed=3"])
    assert set(metrics) >= {"AP", "AP50", "per_class"}
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    scored = detector.evaluate(best, config)
    assert scored.values["AP"] == pytest.approx(metrics["AP"])
    assert (tmp_path / "run" / "checkpoints" / "eval_val" / "metrics.json").exists()
    model = detector.load_detector(best, device="cpu", score_thresh=0.0)
    image = next(images_of(data.val).iterdir())
    one = model(image)
    assert len(one)
    both = model([str(image), np.zeros((50, 40, 3), np.uint8)])
    assert [len(found) > 0 for found in both] == [True, True]
    assert both[0].scores.tolist() == pytest.approx(one.scores.tolist(), abs=1e-5)


def test_settings_may_be_given_as_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        detector.train({"trian": {}}, tmp_path / "run")


def test_the_examples_of_the_front_door_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(detector.api, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.attempted > 2
    assert result.failed == 0
