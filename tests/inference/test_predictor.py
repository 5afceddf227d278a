"""Prediction: which files are meant, what is said about them, and that one bad file spoils nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detector.errors import InputError
from detector.inference.predictor import find_pictures, load_predictor, predict_files
from detector.structures import Detections
from detector.training.train import train
from tests.conftest import Run
from tests.tiny import TinyData, images_of, tiny_config, write_coco
from tools.predict import main


@pytest.fixture
def pictures(data: TinyData, tmp_path: Path) -> Path:
    """a/x.png, a/deep/y.PNG, b/x.png, and a text file."""
    source = Image.open(next(images_of(data.val).glob("*.png")))
    for name in ("a/x.png", "a/deep/y.PNG", "b/x.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source.save(path)
    (tmp_path / "in" / "a" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


def predict(run: Run, out: Path, *inputs: Path | str, thresh: float = 0.0) -> tuple[int, list[dict[str, Any]]]:
    checkpoint = str(run.out / "checkpoints" / "best.pt")
    arguments = ["--checkpoint", checkpoint, "--output-dir", str(out), "--score-thresh", str(thresh)]
    code = main([*arguments, *map(str, inputs)])
    path = out / "detections.json"
    return code, json.loads(path.read_text()) if path.exists() else []


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in paths]


def test_files_folders_and_globs_are_each_found_once_in_order(pictures: Path) -> None:
    assert names(find_pictures([str(pictures)]), pictures) == ["a/deep/y.PNG", "a/x.png", "b/x.png"]
    assert names(find_pictures([str(pictures / "*" / "x.png")]), pictures) == ["a/x.png", "b/x.png"]
    assert names(find_pictures([str(pictures / "**" / "*.PNG")]), pictures) == ["a/deep/y.PNG"]
    both = [str(pictures / "b" / "x.png"), str(pictures)]
    assert names(find_pictures(both), pictures) == ["b/x.png", "a/deep/y.PNG", "a/x.png"]
    assert names(find_pictures([str(pictures / "a" / "notes.txt")]), pictures) == ["a/notes.txt"], "named by hand"


def test_all_inputs_that_stand_for_nothing_are_told(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    with pytest.raises(InputError) as told:
        find_pictures([str(pictures / "empty"), str(pictures / "a"), "nowhere.jpg", "*.nothing"])
    text = str(told.value)
    assert f"{pictures / 'empty'}: a folder without pictures" in text
    assert "nowhere.jpg: no file" in text
    assert "*.nothing: no file" in text


def test_a_folder_of_inputs_is_not_written_into(whole: Run, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (pictures / "b" / "x.png").read_bytes()
    assert predict(whole, pictures / "b", pictures)[0] == 2
    assert "must hold none of the inputs" in capsys.readouterr().err
    assert [p.name for p in (pictures / "b").iterdir()] == ["x.png"]
    assert (pictures / "b" / "x.png").read_bytes() == before


def test_detections_json_keeps_its_contract(whole: Run, pictures: Path, tmp_path: Path) -> None:
    code, found = predict(whole, tmp_path / "out", pictures)
    assert code == 0
    assert {r["image_id"] for r in found} == {0, 1, 2}, "they count the inputs"
    assert {r["category_id"] for r in found} <= {3, 7, 90}, "those of the checkpoint"
    files = [str(pictures / name) for name in ("a/deep/y.PNG", "a/x.png", "b/x.png")]
    for record in found:
        assert list(record) == ["image_id", "category_id", "bbox", "score", "file_name"]
        assert record["file_name"] == files[record["image_id"]]
        assert 0 < record["score"] < 1
    predictor = load_predictor(whole.out / "checkpoints" / "best.pt", device=torch.device("cpu"), score_thresh=0.0)
    (prediction,) = predict_files(predictor, [pictures / "a" / "x.png"])
    assert prediction.detections is not None
    mine = [r for r in found if r["image_id"] == 1]
    assert [r["score"] for r in mine] == prediction.detections.scores.double().tolist(), "at full precision"
    boxes = prediction.detections.boxes.double().numpy()
    wanted = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    assert [r["bbox"] for r in mine] == wanted


def test_files_of_one_name_are_drawn_into_files_of_their_own(whole: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "a" / "x.png").rename(pictures / "a" / "x_2.png")
    inputs = [pictures / "a" / "x_2.png", pictures / "b" / "x.png", pictures / "a" / "deep" / "y.PNG"]
    (pictures / "c").mkdir()
    for name in ("x.jpg", "x.bmp"):
        Image.new("RGB", (40, 30)).save(pictures / "c" / name)
        inputs.append(pictures / "c" / name)
    assert predict(whole, tmp_path / "out", *inputs, thresh=0.9)[0] == 0
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(inputs)


def test_an_unreadable_file_is_told_and_the_others_are_done(
    whole: Run, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "a" / "x.png").write_bytes(b"")
    code, found = predict(whole, tmp_path / "out", pictures)
    assert code == 2
    assert {r["image_id"] for r in found} == {0, 2}
    error = capsys.readouterr().err
    assert "error: 1 inputs could not be read" in error
    assert str(pictures / "a" / "x.png") in error


def test_nothing_found_is_an_empty_list(whole: Run, pictures: Path, tmp_path: Path) -> None:
    assert predict(whole, tmp_path / "out", pictures / "b", thresh=1.0) == (0, [])
    assert (tmp_path / "out" / "x.jpg").exists()


def detected(run: Run, path: Path) -> Detections:
    predictor = load_predictor(run.out / "checkpoints" / "best.pt", device=torch.device("cpu"), score_thresh=0.0)
    (prediction,) = predict_files(predictor, [path])
    assert prediction.detections is not None, prediction.error
    return prediction.detections


def test_a_turned_picture_is_seen_upright(whole: Run, pictures: Path) -> None:
    """Stored on its side with an orientation tag, as phones do."""
    upright = Image.open(pictures / "a" / "x.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(pictures / "turned.png", exif=exif)
    expected, found = detected(whole, pictures / "a" / "x.png"), detected(whole, pictures / "turned.png")
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_pictures_lie_as_those_of_training_did(tmp_path: Path) -> None:
    """Annotations made on pictures as stored, whose orientation tags they ignore: prediction ignores them too."""
    annotations = write_coco(tmp_path / "train.json", 4, seed=1, sizes=((96, 128),))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in images_of(annotations).iterdir():
        Image.open(path).save(path, exif=exif)
    data = TinyData(annotations, annotations)
    config = tiny_config(tmp_path, data, train__epochs=1, data__val=None, data__verify="header")
    train(config, tmp_path / "run")
    predictor = load_predictor(tmp_path / "run/checkpoints/best.pt", device=torch.device("cpu"), score_thresh=0.0)
    (prediction,) = predict_files(predictor, [path])
    assert prediction.image is not None
    assert prediction.image.shape[:2] == (96, 128)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_kind_are_predicted(mode: str, whole: Run, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((50, 70), 40_000, np.uint16)).save(path)
    else:
        Image.new("RGB", (70, 50), (90, 10, 200)).convert(mode).save(path)
    boxes = detected(whole, path).boxes
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([70.0, 50.0, 70.0, 50.0]) + 1e-3).all()


def test_averaged_weights_are_used(whole: Run) -> None:
    predictor = load_predictor(whole.out / "checkpoints" / "best.pt", device=torch.device("cpu"))
    from detector.checkpoint import load_checkpoint

    ema = load_checkpoint(whole.out / "checkpoints" / "best.pt").ema
    assert ema is not None
    assert all(torch.equal(v, ema[k]) for k, v in predictor.detector.model.state_dict().items())
