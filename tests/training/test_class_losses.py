"""The class losses in training: every kind learns, weights are counted, the first loss is what it must be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.checkpoint import TrainState
from detector.config_yaml import load_config
from detector.datasets.opening import open_datasets
from detector.errors import ConfigError
from detector.inference.postprocess import postprocess
from detector.inference.predictor import model_of
from detector.models import build_model
from detector.scores import score_logits
from detector.training import setup as learner_setup
from detector.training.logger import RunLog
from detector.training.setup import build_learner
from detector.training.train import train
from tests.tiny import TinyData, differing, last_checkpoint, records, tiny_config, write_coco

SHORT: dict[str, Any] = {"train__epochs": 1, "data__val": None}
SOFTMAX = {"depth": 1, "activation": "softmax"}

LOSSES: dict[str, dict[str, Any]] = {
    "focal_star": {"loss__cls": "focal_star", "loss__alpha": None},
    "poly1_focal": {"loss__cls": "poly1_focal"},
    "quality_focal": {"loss__cls": "quality_focal"},
    "varifocal": {"loss__cls": "varifocal", "loss__alpha": 0.75},
    "ghm": {"loss__cls": "ghm"},
    "ohem": {"loss__cls": "ohem", "loss__alpha": None},
    "ohem 1:3": {"loss__cls": "ohem", "loss__alpha": None, "loss__ohem_negatives_per_positive": 3},
    "bootstrap": {"loss__cls": "bootstrap", "loss__alpha": None},
    "softmax": {"model__head": SOFTMAX},
    "softmax star": {"model__head": SOFTMAX, "loss__cls": "focal_star"},
    "softmax ohem": {"model__head": SOFTMAX, "loss__cls": "ohem", "loss__alpha": None},
    "by class": {"loss__alpha": [0.5, 1.0, 2.0]},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_in_parts_and_in_bf16(name: str, data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, data, **{**SHORT, **LOSSES[name], "train__micro_batch": 2, "train__precision": "bf16"}
    )
    train(config, tmp_path / "run")
    losses = [r["loss_cls"] for r in records(tmp_path / "run")]
    assert len(losses) == 3
    assert all(math.isfinite(x) and x > 0 for x in losses)


def test_a_softmax_head_is_evaluated_used_and_fine_tuned_as_such(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, data, model__head=SOFTMAX, train__epochs=1, postprocess__score_thresh=0.001)
    assert train(config, tmp_path / "run")["AP"] >= 0
    state = last_checkpoint(tmp_path / "run")
    assert state.model["cls_subnet.predictor.bias"].shape == (9 * 4,), "three classes and the background"
    new = write_coco(tmp_path / "new.json", 4, seed=3, classes={"disc": 1, "Bar": 2, "hexagon": 5})
    tuned = tiny_config(
        tmp_path, TinyData(new, new), **SHORT, model__head=SOFTMAX, optim__lr=1e-12, optim__warmup_steps=0,
        train__init_from=str(tmp_path / "run/checkpoints/last.pt"),
    )  # fmt: skip
    train(tuned, tmp_path / "tuned")
    old = torch.unflatten(state.model["cls_subnet.predictor.bias"], 0, (9, 4))
    moved = torch.unflatten(last_checkpoint(tmp_path / "tuned").model["cls_subnet.predictor.bias"], 0, (9, 4))
    torch.testing.assert_close(moved[:, [0, 1, 3]], old[:, [0, 2, 3]], rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"head\.activation: sigmoid in the config, softmax in the checkpoint"):
        train(
            tiny_config(tmp_path, data, **SHORT, train__init_from=str(tmp_path / "run/checkpoints/last.pt"),
                        model__head={"depth": 1, "activation": "sigmoid"}),
            tmp_path / "other",
        )  # fmt: skip


def test_the_classes_of_a_softmax_share_the_prior() -> None:
    config = load_config(
        Path("configs/quickstart.yaml"), ["model.head.activation=softmax", "model.head.prior_prob=0.02"]
    )
    bias = build_model(config.model, 7).cls_subnet.predictor.bias
    assert bias is not None
    p = torch.unflatten(bias.detach(), 0, (9, 8)).softmax(dim=-1)
    torch.testing.assert_close(p[:, :7].sum(dim=1), torch.full((9,), 0.02))
    torch.testing.assert_close(p[:, :7], torch.full((9, 7), 0.02 / 7))


def test_a_loss_without_a_softmax_form_is_refused(data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.cls must be one of focal, focal_star, ohem, bootstrap with .*got ghm"):
        tiny_config(tmp_path, data, model__head=SOFTMAX, loss__cls="ghm")


@pytest.mark.parametrize("alpha", ["inverse_frequency", "effective_number"])
def test_weights_of_classes_are_counted_logged_and_counted_alike_on_resuming(
    alpha: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = write_coco(tmp_path / "train.json", 6, seed=1)
    content = json.loads(annotations.read_text())
    ids = [a["category_id"] for a in content["annotations"]]
    expected = {name: 1 / ids.count(i) for name, i in {"disc": 3, "square": 7, "bar": 90}.items()}
    config = tiny_config(
        tmp_path, TinyData(annotations, annotations), **SHORT, loss__alpha=alpha, loss__alpha_beta=0.9999999
    )
    train(config, tmp_path / "run")
    (printed,) = re.findall(r"weights of positives by class: (.*)", capsys.readouterr().out)
    weights = {pair.split()[0]: float(pair.split()[1]) for pair in printed.split(", ")}
    mean = sum(expected.values()) / 3
    for name, weight in weights.items():
        assert weight == pytest.approx(expected[name] / mean, rel=0.01)
    stored = last_checkpoint(tmp_path / "run").alpha
    assert stored is not None
    assert [f"{x:.3g}" for x in stored] == [pair.split()[1] for pair in printed.split(", ")]
    assert train(config, tmp_path / "run", resume="auto") == {}


@pytest.mark.parametrize(
    ("settings", "weigh"),
    [
        ({"loss__alpha": "inverse_frequency", "loss__alpha_exponent": 0.5}, lambda n: n**-0.5),
        ({"loss__alpha": "inverse_frequency", "loss__alpha_exponent": 2.0}, lambda n: n**-2.0),
        ({"loss__alpha": "effective_number", "loss__alpha_beta": 0.5}, lambda n: 0.5 / (1 - 0.5**n)),
        ({"loss__alpha": "effective_number", "loss__alpha_beta": 0.9}, lambda n: 0.1 / (1 - 0.9**n)),
    ],
)
def test_a_run_weighs_classes_by_its_own_exponent_or_beta(
    settings: dict[str, Any], weigh: Callable[[float], float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2, 5 and 14 objects, in the order of the category ids: disc, square, bar."""
    annotations = write_coco(tmp_path / "train.json", 7, seed=1)
    content = json.loads(annotations.read_text())
    some = content["annotations"][0]
    content["annotations"] = [
        {**some, "id": i + 1, "image_id": 10 * (i % 7 + 1), "category_id": ([3] * 2 + [7] * 5 + [90] * 14)[i]}
        for i in range(21)
    ]
    annotations.write_text(json.dumps(content))
    config = tiny_config(tmp_path, TinyData(annotations, annotations), **SHORT, **settings)
    train_set, _, _ = open_datasets(config, tmp_path, quiet=True)
    log = RunLog(tmp_path, start_step=0, total_steps=1)
    state = TrainState(config, train_set.categories, {}, step=0)
    learner = build_learner(config, train_set, state, resumed=False, source=None, device=torch.device("cpu"), log=log)
    log.close()
    weights = [weigh(2), weigh(5), weigh(14)]
    expected = pytest.approx([3 * weight / sum(weights) for weight in weights], rel=1e-5)
    assert state.alpha == expected
    assert isinstance(learner.loss.class_loss.alpha, torch.Tensor)
    assert learner.loss.class_loss.alpha.tolist() == expected
    expected_text = ", ".join(f"{k} {x:.3g}" for k, x in zip(("disc", "square", "bar"), state.alpha or [], strict=True))
    assert f"weights of positives by class: {expected_text}" in capsys.readouterr().out


def test_a_list_of_weights_must_fit_the_classes(data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one weight for each of the 3 classes \(disc, square, bar\), got 2"):
        train(tiny_config(tmp_path, data, **SHORT, loss__alpha=[1.0, 2.0]), tmp_path / "run")


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_first_loss_is_compared_with_its_closed_form(
    gamma: float, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arithmetic in the log, done again: per positive one entry at the prior and two below, per background
    three."""
    train(tiny_config(tmp_path, data, **SHORT, loss__gamma=gamma), tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"first class loss ([\d.]+), as expected at the prior: ([\d,]+) background anchors x (\S+) \+ ([\d,]+) "
        r"positive anchors x (\S+), over ([\d,]+), gives ([\d.]+)",
        printed,
    )
    assert found is not None, printed
    loss, background, of_one, positives, of_positive, divisor, total = (
        float(x.replace(",", "")) for x in found.groups()
    )
    negative = 0.75 * 0.01**gamma * -math.log(0.99)
    positive = 0.25 * 0.99**gamma * -math.log(0.01)
    assert of_one == pytest.approx(3 * negative, rel=0.01)
    assert of_positive == pytest.approx(positive + 2 * negative, rel=0.01)
    assert divisor == positives > 0
    assert total == pytest.approx(
        (background * 3 * negative + positives * (positive + 2 * negative)) / divisor, abs=1e-3
    )
    assert loss == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_first_loss_that_cannot_be_is_warned_of(
    what: str, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that shout, or a prior that was forgotten."""

    def loud(*arguments: Any) -> Any:
        model = build_model(*arguments)
        with torch.no_grad():
            model.cls_subnet.predictor.get_parameter(what).mul_(1000 if what == "weight" else 0)
        return model

    monkeypatch.setattr(learner_setup, "build_model", loud)
    train(tiny_config(tmp_path, data, **SHORT, optim__clip_grad_norm=1.0), tmp_path / "run")
    assert "but at the prior" in " ".join(capsys.readouterr().out.split())


def test_scores_of_a_softmax_are_its_probabilities(data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, model__head=SOFTMAX, **SHORT)
    train(config, tmp_path / "run")
    state = last_checkpoint(tmp_path / "run")
    model = model_of(state, torch.device("cpu"))
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(images, torch.tensor([[64, 96]]))
    assert outputs.activation == "softmax"
    p = outputs.all_cls_logits().softmax(dim=-1)
    torch.testing.assert_close(torch.sigmoid(score_logits(outputs.all_cls_logits(), "softmax")), p[..., :3])
    (found,) = postprocess(outputs, torch.tensor([[64, 96]]), score_thresh=0.0, nms_thresh=1.0, detections_per_img=10)
    torch.testing.assert_close(found.scores, p[0, :, :3].flatten().topk(10).values)


@pytest.mark.parametrize("sampling", ["repeat_factor", "class_balanced"])
def test_sampling_by_class_is_logged_and_reproducible(
    sampling: str, data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SHORT, "data__sampling": sampling, "data__repeat_threshold": 0.9}
    train(tiny_config(tmp_path, data, **settings), tmp_path / "one")
    assert re.search(rf"{sampling} sampling: \d+ images per epoch from 11", " ".join(capsys.readouterr().out.split()))
    train(tiny_config(tmp_path, data, **settings, data__num_workers=1), tmp_path / "other")
    assert differing(last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "other")) == []
