"""Prediction: accepted inputs, batches, result files, and that an unreadable file does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detector.checkpoint import load_checkpoint
from detector.errors import ConfigError, ImageError, InputError
from detector.inference.image_files import find_images
from detector.inference.predictions import predict_files
from detector.inference.predictor import Predictor, load_predictor
from detector.structures import Detections
from detector.training.train import train
from tests.conftest import Run
from tests.tiny import REPO, TinyData, images_of, tiny_config, write_coco
from tools.predict import main


@pytest.fixture
def images(data: TinyData, tmp_path: Path) -> Path:
    """a/x.png, a/deep/y.PNG, b/x.png, and a text file."""
    source = Image.open(next(images_of(data.val).glob("*.png")))
    for name in ("a/x.png", "a/deep/y.PNG", "b/x.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source.save(path)
    (tmp_path / "in" / "a" / "notes.txt").write_text("not an image")
    return tmp_path / "in"


def predict(run: Run, out: Path, *inputs: Path | str, thresh: float = 0.0) -> tuple[int, list[dict[str, Any]]]:
    checkpoint = str(run.out / "checkpoints" / "best.pt")
    arguments = ["--checkpoint", checkpoint, "--output-dir", str(out), "--score-thresh", str(thresh)]
    code = main([*arguments, *map(str, inputs)])
    path = out / "detections.json"
    return code, json.loads(path.read_text()) if path.exists() else []


def names(paths: list[Path], root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in paths]


def test_files_folders_and_globs_are_each_found_once_in_order(images: Path) -> None:
    assert names(find_images([str(images)]), images) == ["a/deep/y.PNG", "a/x.png", "b/x.png"]
    assert names(find_images([str(images / "*" / "x.png")]), images) == ["a/x.png", "b/x.png"]
    assert names(find_images([str(images / "**" / "*.PNG")]), images) == ["a/deep/y.PNG"]
    both = [str(images / "b" / "x.png"), str(images)]
    assert names(find_images(both), images) == ["b/x.png", "a/deep/y.PNG", "a/x.png"]
    assert names(find_images([str(images / "a" / "notes.txt")]), images) == ["a/notes.txt"], "named explicitly"


def test_all_inputs_without_images_are_reported(images: Path) -> None:
    (images / "empty").mkdir()
    with pytest.raises(InputError) as raised:
        find_images([str(images / "empty"), str(images / "a"), "nowhere.jpg", "*.nothing"])
    text = str(raised.value)
    assert f"{images / 'empty'}: a folder without images" in text
    assert "nowhere.jpg: no file" in text
    assert "*.nothing: no file" in text


def test_a_folder_of_inputs_is_not_written_into(whole: Run, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (images / "b" / "x.png").read_bytes()
    assert predict(whole, images / "b", images)[0] == 2
    assert "must contain none of the inputs" in capsys.readouterr().err
    assert [p.name for p in (images / "b").iterdir()] == ["x.png"]
    assert (images / "b" / "x.png").read_bytes() == before


def test_detections_json_keeps_its_contract(whole: Run, images: Path, tmp_path: Path) -> None:
    code, found = predict(whole, tmp_path / "out", images)
    assert code == 0
    assert {r["image_id"] for r in found} == {0, 1, 2}, "they count the inputs"
    assert {r["category_id"] for r in found} <= {3, 7, 90}, "the checkpoint's ids"
    files = [str(images / name) for name in ("a/deep/y.PNG", "a/x.png", "b/x.png")]
    for record in found:
        assert list(record) == ["image_id", "category_id", "bbox", "score", "file_name", "category_name"]
        assert record["category_name"] == {3: "disc", 7: "square", 90: "bar"}[record["category_id"]]
        assert record["file_name"] == files[record["image_id"]]
        assert 0 < record["score"] < 1
    predictor = load_predictor(whole.out / "checkpoints" / "best.pt", device=torch.device("cpu"), score_thresh=0.0)
    (prediction,) = predict_files(predictor, [images / "a" / "x.png"])
    assert prediction.detections is not None
    of_image = [r for r in found if r["image_id"] == 1]
    assert [r["score"] for r in of_image] == prediction.detections.scores.double().tolist(), "at full precision"
    boxes = prediction.detections.boxes.double().numpy()
    wanted = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    assert [r["bbox"] for r in of_image] == wanted


def test_files_of_the_same_name_are_drawn_into_separate_files(whole: Run, images: Path, tmp_path: Path) -> None:
    (images / "a" / "x.png").rename(images / "a" / "x_2.png")
    inputs = [images / "a" / "x_2.png", images / "b" / "x.png", images / "a" / "deep" / "y.PNG"]
    (images / "c").mkdir()
    for name in ("x.jpg", "x.bmp"):
        Image.new("RGB", (40, 30)).save(images / "c" / name)
        inputs.append(images / "c" / name)
    assert predict(whole, tmp_path / "out", *inputs, thresh=0.9)[0] == 0
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(inputs)


def test_an_unreadable_file_is_reported_and_does_not_stop_the_others(
    whole: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "a" / "x.png").write_bytes(b"")
    code, found = predict(whole, tmp_path / "out", images)
    assert code == 2
    assert {r["image_id"] for r in found} == {0, 2}
    error = capsys.readouterr().err
    assert "error: 1 input is unreadable" in error
    assert str(images / "a" / "x.png") in error


def test_no_detections_give_an_empty_list(whole: Run, images: Path, tmp_path: Path) -> None:
    assert predict(whole, tmp_path / "out", images / "b", thresh=1.0) == (0, [])
    assert (tmp_path / "out" / "x.jpg").exists()


def detected(run: Run, path: Path) -> Detections:
    predictor = load_predictor(run.out / "checkpoints" / "best.pt", device=torch.device("cpu"), score_thresh=0.0)
    (prediction,) = predict_files(predictor, [path])
    assert prediction.detections is not None, prediction.error
    return prediction.detections


def test_an_image_is_turned_by_its_exif_orientation(whole: Run, images: Path) -> None:
    """Stored rotated with an orientation tag, as phones do."""
    upright = Image.open(images / "a" / "x.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(images / "turned.png", exif=exif)
    expected, found = detected(whole, images / "a" / "x.png"), detected(whole, images / "turned.png")
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)


def test_exif_orientation_is_ignored_as_in_training(tmp_path: Path) -> None:
    """Annotations made on images as stored ignore orientation tags; then prediction ignores them too."""
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
def test_images_of_any_mode_are_predicted(mode: str, whole: Run, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((50, 70), 40_000, np.uint16)).save(path)
    else:
        Image.new("RGB", (70, 50), (90, 10, 200)).convert(mode).save(path)
    boxes = detected(whole, path).boxes
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([70.0, 50.0, 70.0, 50.0]) + 1e-3).all()


@pytest.fixture(scope="module")
def predictor(whole: Run) -> Predictor:
    return load_predictor(whole.out / "checkpoints" / "best.pt", device="cpu", score_thresh=0.0)


@pytest.fixture(scope="module")
def path(data: TinyData) -> Path:
    return min(images_of(data.val).glob("*.png"))


def same(a: Detections, b: Detections, *, atol: float = 0.0) -> bool:
    if len(a) != len(b):
        return False
    close = torch.allclose(a.boxes, b.boxes, rtol=0, atol=100 * atol)
    return close and torch.allclose(a.scores, b.scores, rtol=0, atol=atol) and torch.equal(a.labels, b.labels)


def test_a_path_a_pil_image_and_an_array_give_the_same_detections(predictor: Predictor, path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    expected = predictor(path)
    assert len(expected) > 5
    assert same(predictor(str(path)), expected)
    assert same(predictor(Image.open(path)), expected)
    assert same(predictor(pixels), expected)
    assert same(predictor(pixels[..., ::-1], channel_order="bgr"), expected)
    assert not same(predictor(pixels[..., ::-1]), expected)


def test_a_pil_image_is_converted_and_turned_like_its_file(predictor: Predictor, path: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("L", "P", "RGBA"):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).convert(mode).save(tmp_path / "x.png", exif=exif)
        assert same(predictor(Image.open(tmp_path / "x.png")), predictor(tmp_path / "x.png"))


def test_detections_carry_the_class_names(predictor: Predictor, path: Path) -> None:
    found = predictor(path)
    assert found.class_names == ("disc", "square", "bar")  # sorted by category id
    assert found.names == [found.class_names[label] for label in found.labels.tolist()]
    assert found.cpu().names == found.names
    assert Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).names == []


def test_a_list_gives_the_detections_of_each_image_in_order_from_batches_of_one_padded_size(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    sizes = [(96, 128), (128, 96), (90, 128), (60, 60), (96, 120), (128, 90), (95, 127)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    single = [predictor(image) for image in images]
    assert predictor([]) == []
    shapes = []
    detect = predictor.detector.__class__.__call__

    def counted(self: Any, batch: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tuple(batch.shape))
        return detect(self, batch, *args, **options)

    monkeypatch.setattr(predictor.detector.__class__, "__call__", counted)
    found = predictor(images, batch_size=3)
    # short sides of 64, long sides padded to 96: four images of one canvas, of which three fill a batch
    assert sorted(shapes) == [(1, 3, 64, 64), (1, 3, 64, 96), (2, 3, 96, 64), (3, 3, 64, 96)]
    assert all(same(a, b, atol=1e-5) for a, b in zip(found, single, strict=True))
    shapes.clear()
    assert len(predictor(tuple(images[:2]), batch_size=1)) == 2
    assert shapes == [(1, 3, 64, 96), (1, 3, 96, 64)]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), r"got float32 \(4, 5, 3\); convert its values to 0\.\.255 in uint8"),
        (np.zeros((4, 5, 3), np.int64), r"got int64 \(4, 5, 3\); convert"),
        (np.zeros((4, 5), np.uint8), r"got uint8 \(4, 5\); repeat a grey image's channel"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 \(4, 5, 4\); drop the alpha channel"),
        (np.zeros((3, 4, 5), np.uint8), r"got uint8 \(3, 4, 5\); move the channels last"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"got uint8 \(1, 4, 5, 3\); pass a list of images"),
        (np.zeros((0, 5, 3), np.uint8), r"got uint8 \(0, 5, 3\)$"),
        (torch.zeros(3, 4, 5), r"got Tensor"),
        (b"x.jpg", r"got bytes"),
        (Image.new("F", (5, 4)), r"got a PIL image of floating-point pixels"),
    ],
)
def test_another_type_or_shape_is_an_error_that_states_what_is_expected(
    image: Any, message: str, predictor: Predictor, path: Path
) -> None:
    expected = r"must be a path, a PIL image or a uint8 array \(H, W, 3\), "
    with pytest.raises(InputError, match="^image " + expected + message):
        predictor(image)
    with pytest.raises(InputError, match=r"^images\[1\] " + expected + message):
        predictor([path, image])


def test_an_unreadable_path_or_pil_image_is_an_error(predictor: Predictor, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.jpg: no such file"):
        predictor("nowhere.jpg")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="got one that cannot be decoded"):
        predictor(Image.open(truncated))


def test_auto_prefers_mps_to_the_cpu(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    monkeypatch.setattr("detector.inference.predictor.Predictor", lambda _, device, **__: devices.append(str(device)))
    checkpoint = whole.out / "checkpoints" / "best.pt"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    load_predictor(checkpoint)
    with pytest.raises(ConfigError, match="got mps: torch sees no MPS device"):
        load_predictor(checkpoint, device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    load_predictor(checkpoint)
    load_predictor(checkpoint, device="mps")
    load_predictor(checkpoint, device="cpu")
    assert devices == ["cpu", "mps", "mps", "cpu"]


def test_prediction_imports_nothing_of_training(whole: Run, path: Path) -> None:
    """Importing torchvision takes longer than importing torch, and albumentations a second."""
    code = (
        "import sys\n"
        "from detector.inference.predictor import load_predictor\n"
        f"assert len(load_predictor({str(whole.out / 'checkpoints' / 'best.pt')!r}, score_thresh=0)({str(path)!r}))\n"
        "unwanted = ('detector.training', 'detector.evaluation', 'detector.losses', 'albumentations', 'tensorboard',\n"
        "    'torchvision', 'torch._dynamo', 'sympy', 'rich', 'matplotlib', 'scipy')\n"
        "assert not [m for m in sys.modules if m.startswith(unwanted)], sys.modules"
    )
    code = code.replace(
        "from detector.inf",
        "from detector.models.resnet import ARCHITECTURES, Architecture\n"
        "ARCHITECTURES['resnet18'] = Architecture(False, (1, 1, 1, 1))\nfrom detector.inf",
    )  # the tiny run's
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_ema_weights_are_used(whole: Run) -> None:
    predictor = load_predictor(whole.out / "checkpoints" / "best.pt", device="cpu")
    ema = load_checkpoint(whole.out / "checkpoints" / "best.pt").ema
    assert ema is not None
    assert all(torch.equal(v, ema[k]) for k, v in predictor.detector.model.state_dict().items())
