"""Predictions for files: one odd file does no harm, and what is done is on disk at any moment."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detector.errors import InputError, RunError
from detector.inference import predictions as module
from detector.inference.image_files import find_images
from detector.inference.predictions import predict_files, predict_to_folder, write_results
from detector.inference.predictor import Predictor, load_predictor
from detector.inference.progress import CountProgress
from detector.reports.draw import draw_detections
from tests.conftest import Run
from tests.reliability.faults import FaultyDisk, faulty_disk, small_disk
from tests.tiny import REPO, TinyData, images_of, start_process, start_tool, wait, wait_for
from tools import predict as predict_tool

SHARED_CASES = ("13-predict-70000-wide", "14-predict-dots", "15-predict-symlink-circle", "16-predict-fifo")


@pytest.fixture(scope="module")
def predictor(whole: Run) -> Predictor:
    return load_predictor(whole.out / "checkpoints" / "best.pt", device="cpu", score_thresh=0.0)


@pytest.fixture
def inputs(data: TinyData, tmp_path: Path) -> Path:
    """a.png, b.png and c.png."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, path in zip("abc", sorted(images_of(data.val).glob("*.png")), strict=False):
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    return folder


def predict(predictor: Predictor, paths: list[Path], out: Path, **options: Any) -> module.Summary:
    out.mkdir(exist_ok=True)
    return predict_to_folder(predictor, paths, out, draw=draw_detections, **options)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]


def results_of(out: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((out / "detections.json").read_text())
    return results


def run_tool(run: Run, out: Path, *inputs: Path | str) -> int:
    checkpoint = str(run.out / "checkpoints" / "best.pt")
    return predict_tool.main(["--checkpoint", checkpoint, "--output-dir", str(out), *map(str, inputs)])


def test_no_files_give_empty_results(predictor: Predictor, tmp_path: Path) -> None:
    assert predict(predictor, [], tmp_path / "out").done == 0
    assert lines_of(tmp_path / "out") == []
    assert results_of(tmp_path / "out") == []


def test_every_line_has_what_is_documented_and_the_results_repeat_it(
    predictor: Predictor, inputs: Path, tmp_path: Path
) -> None:
    (inputs / "b.png").write_bytes(b"no image")
    paths, out = find_images([str(inputs)]), tmp_path / "out"
    summary = predict(predictor, paths, out)
    assert (summary.predicted, summary.unreadable, summary.exit_code) == (2, 1, 2)
    lines, expected = lines_of(out), []
    assert [line["image_id"] for line in lines] == [0, 1, 2]
    assert [line["file_name"] for line in lines] == [str(path) for path in paths]
    assert list(lines[1]) == ["format", "image_id", "file_name", "error"]
    assert "is no image of a known format" in lines[1]["error"]
    for line in (lines[0], lines[2]):
        assert list(line) == ["format", "image_id", "file_name", "height", "width", "detections", "drawn"]
        with Image.open(line["file_name"]) as image:
            assert (line["width"], line["height"]) == image.size
        with Image.open(out / line["drawn"]) as drawn:
            drawn.load()
        for found in line["detections"]:
            assert list(found) == ["category_id", "category_name", "bbox", "score"]
            common = {"image_id": line["image_id"], "file_name": line["file_name"]}
            expected.append({**found, **common})
    assert len(expected) > 10
    assert results_of(out) == expected
    assert [name for name in os.listdir(out) if name.startswith(".")] == []


def test_a_line_is_on_disk_as_soon_as_its_file_is_done(predictor: Predictor, inputs: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    out.mkdir()
    (out / "detections.json").write_text("of an earlier run")

    def look(done: int, total: int) -> None:
        seen.append((done, total, len(lines_of(out)), (out / "detections.json").exists()))

    predict(predictor, find_images([str(inputs)]), out, progress=look)
    assert seen == [(1, 3, 1, False), (2, 3, 2, False), (3, 3, 3, False)]
    assert len(results_of(out)) > 10


@pytest.mark.parametrize("case", SHARED_CASES)
def test_odd_files_are_reported_and_the_others_predicted(
    case: str, whole: Run, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (shared / "cases" / "hostile" / case / "in").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    good = len(list(folder.iterdir()))
    if "circle" in case:
        (folder / "z.png").symlink_to("z.png")
    if "fifo" in case:
        os.mkfifo(folder / "z.jpg")
    odd = len(list(folder.iterdir())) - good
    out = tmp_path / "out"
    assert run_tool(whole, out, folder) == (2 if odd else 0)
    error = capsys.readouterr().err
    assert error.count("error: ") == odd
    assert "Traceback" not in error
    assert len([line for line in lines_of(out) if "error" in line]) == odd
    drawn = [line["drawn"] for line in lines_of(out) if "error" not in line]
    assert sorted(drawn) == sorted(path.name for path in out.glob("*.jpg"))
    assert len(set(drawn)) == good
    assert (out / "detections.json").exists()


def test_a_side_beyond_what_jpeg_allows_is_drawn_smaller(predictor: Predictor, tmp_path: Path) -> None:
    Image.new("RGB", (140_001, 7), (90, 30, 60)).save(tmp_path / "wide.png")
    summary = predict(predictor, [tmp_path / "wide.png"], tmp_path / "out")
    (line,) = lines_of(tmp_path / "out")
    assert "drawn at 1/3 of its size" in line["note"]
    assert line["width"] == 140_001
    with Image.open(tmp_path / "out" / line["drawn"]) as drawn:
        assert drawn.width == 46_667
    assert summary.exit_code == 0
    assert summary.report().startswith(f"warning: {tmp_path / 'wide.png'}: drawn at 1/3")


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("...jpg", "image.jpg"),
        ("..jpg", "image.jpg"),
        (".hidden.png", "hidden.jpg"),
        ("a.b.png", "a.b.jpg"),
        ("\x1b[31mred\n.png", "_[31mred_.jpg"),
        ("ünïcode.png", "ünïcode.jpg"),
        (os.fsdecode(b"\xff\xfe.png"), "__.jpg"),
        ("x" * 250 + ".png", "x" * 180 + ".jpg"),
        ("é" * 125 + ".png", "é" * 90 + ".jpg"),
    ],
)
def test_every_name_gives_a_printable_name_that_fits(
    name: str, drawn: str, predictor: Predictor, data: TinyData, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(next(images_of(data.val).glob("*.png")).read_bytes())
    assert predict(predictor, [path], tmp_path / "out").exit_code == 0
    (line,) = lines_of(tmp_path / "out")
    assert line["file_name"] == str(path)
    assert line["drawn"] == drawn
    assert (tmp_path / "out" / drawn).exists()


def test_names_that_differ_in_case_only_are_kept_apart(predictor: Predictor, inputs: Path, tmp_path: Path) -> None:
    (inputs / "A.png").write_bytes((inputs / "a.png").read_bytes())
    for order in (["a.png", "A.png", "b.png"], ["A.png", "a.png", "b.png"]):
        predict(predictor, [inputs / name for name in order], tmp_path / "out")
        names = [line["drawn"] for line in lines_of(tmp_path / "out")]
        assert len({name.casefold() for name in names}) == 3


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("something\x1b odd"), "RuntimeError: something\\x1b odd"),
        (MemoryError(), "needs more memory than is free"),
        (torch.OutOfMemoryError("CUDA out of memory"), "needs more memory than the GPU has free; use --device cpu"),
        (ValueError("x" * 10_000), "characters left out"),
    ],
)
def test_whatever_detecting_or_drawing_raises_concerns_one_file(
    error: Exception, text: str, predictor: Predictor, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def fails_second(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise error
        return draw_detections(*arguments)

    paths = find_images([str(inputs)])
    (tmp_path / "out").mkdir()
    summary = predict_to_folder(predictor, paths, tmp_path / "out", draw=fails_second)
    assert (summary.predicted, summary.undrawn, summary.exit_code) == (3, 1, 2)
    lines = lines_of(tmp_path / "out")
    assert [line["drawn"] for line in lines] == ["a.jpg", None, "c.jpg"]
    assert lines[1]["note"].startswith("not drawn: ")
    assert text in lines[1]["note"]
    assert lines[1]["detections"]

    detect, calls = Predictor.__call__, itertools.count()

    def detects_not_second(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise error
        return detect(*arguments, **options)

    monkeypatch.setattr(Predictor, "__call__", detects_not_second)
    found = list(predict_files(predictor, paths))
    assert [prediction.error is None for prediction in found] == [True, False, True]
    assert text in str(found[1].error)


def test_a_gpu_that_no_longer_works_ends_it(
    predictor: Predictor, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Predictor, "__call__", broken)
    with pytest.raises(torch.AcceleratorError):
        list(predict_files(predictor, find_images([str(inputs)])))


def test_one_file_that_cannot_be_written_does_not_stop_the_others(
    predictor: Predictor, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "b.jpg").mkdir(parents=True)
    summary = predict(predictor, find_images([str(inputs)]), tmp_path / "out")
    assert (summary.predicted, summary.undrawn, summary.exit_code) == (3, 1, 2)
    assert "error: 1 image is not drawn:\n" in summary.report()
    assert [line["drawn"] for line in lines_of(tmp_path / "out")] == ["a.jpg", None, "c.jpg"]
    assert {record["image_id"] for record in results_of(tmp_path / "out")} == {0, 1, 2}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("part", ["a.jpg", "b.jpg", "detections.jsonl", "detections.json."])
def test_a_disk_that_fails_ends_it_with_what_is_safe(
    part: str, number: int, predictor: Predictor, inputs: Path, tmp_path: Path
) -> None:
    """At every write."""
    paths = find_images([str(inputs)])
    with faulty_disk(FaultyDisk(part)) as counting:
        predict(predictor, paths, tmp_path / "counted")
    assert counting.writes > 0
    for first in range(counting.writes):
        out = tmp_path / f"out{first}"
        with faulty_disk(FaultyDisk(part, first=first, number=number)), pytest.raises(RunError) as raised:
            predict(predictor, paths, out)
        lines = lines_of(out)
        text = f"detections.jsonl holds the results of the first {len(lines)} of 3 inputs"
        message = str(raised.value)
        assert text in message
        if not part.startswith("detections.json."):
            assert {record["image_id"] for record in results_of(out)} == {line["image_id"] for line in lines}
        assert os.strerror(number) in message
        assert (out / "detections.json").exists() == (not part.startswith("detections.json."))
        assert [name for name in os.listdir(out) if name.startswith(".")] == []
        for line in lines:
            with Image.open(out / line["drawn"]) as drawn:
                drawn.load()


class FillingDisk(io.FileIO):
    """A disk that takes half of a line, and then is full."""

    def write(self, data: Any) -> int:
        if self.tell() > 50:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(bytes(data)[: max(1, len(data) // 2)]) or 0


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    with module._Lines(tmp_path / "x.jsonl") as lines:
        lines.write({"number": 0})
        lines._file.close()
        lines._file = FillingDisk(tmp_path / "x.jsonl", "ab")
        with pytest.raises(RunError, match="No space left on device"):
            lines.write({"number": 1, "text": "x" * 100})
        assert lines.count == 1
    assert (tmp_path / "x.jsonl").read_text() == '{"number": 0}\n'


def test_a_full_disk_is_one_error_of_the_tool(
    whole: Run, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(60):
        (inputs / f"more{i}.png").write_bytes((inputs / "a.png").read_bytes())
    with small_disk(tmp_path / "small", "1m") as disk:
        assert run_tool(whole, disk, inputs, "--score-thresh", "0") == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "No space left on device" in error
        done = len(lines_of(disk))
        assert f"detections.jsonl holds the results of the first {done} of 63 inputs" in error
        assert 0 < done < 63
        assert [name for name in os.listdir(disk) if name.startswith(".")] == []


def test_a_removed_output_folder_is_an_error(predictor: Predictor, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def remove(done: int, _: int) -> None:
        if done == 1:
            (out / "detections.jsonl").unlink()

    with pytest.raises(RunError, match="was removed while it was written"):
        predict(predictor, find_images([str(inputs)]), out, progress=remove)


def predict_slowly(run: Path, inputs: Path, out: Path) -> None:
    """Wait for the test after the second image."""

    def wait_after_second(self: CountProgress, done: int, total: int) -> None:
        if done == 2:
            (out / "second").touch()
            signal.pause()

    CountProgress.update = wait_after_second  # type: ignore[method-assign]
    checkpoint = str(run / "checkpoints" / "best.pt")
    sys.exit(predict_tool.main(["--checkpoint", checkpoint, str(inputs), "--output-dir", str(out)]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_complete_results_of_what_is_done(
    number: signal.Signals, whole: Run, inputs: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = start_process(predict_slowly, (whole.out, inputs, out), log)
    wait_for((out / "second").exists, process, log)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert wait([process], log) == [128 + number]
    assert [line["image_id"] for line in lines_of(out)] == [0, 1]
    assert {record["image_id"] for record in results_of(out)} <= {0, 1}
    assert f"stopped by {number.name} after 2 of 3 inputs, whose results are complete" in log.read_text()


def test_a_killed_process_leaves_whole_lines_and_whole_images(whole: Run, inputs: Path, tmp_path: Path) -> None:
    for i in range(200):
        (inputs / f"more{i}.png").write_bytes((inputs / "a.png").read_bytes())
    out, log = tmp_path / "out", tmp_path / "log"
    checkpoint = str(whole.out / "checkpoints" / "best.pt")
    process = start_tool("predict", ["--checkpoint", checkpoint, str(inputs), "--output-dir", str(out)], log)
    records = out / "detections.jsonl"
    wait_for(lambda: records.exists() and records.read_bytes().count(b"\n") >= 5, process, log)
    process.kill()
    wait([process], log)
    lines = lines_of(out)
    assert 5 <= len(lines) < 203
    for line in lines:
        with Image.open(out / line["drawn"]) as drawn:
            drawn.load()
    assert not (out / "detections.json").exists()


def test_what_a_killed_process_left_half_written_is_removed(predictor: Predictor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with subprocess.Popen(["true"]) as ended:
        pass
    left = [f".a.jpg.{ended.pid}.tmp", f".detections.json.{ended.pid}.tmp"]
    others = [f".b.jpg.{os.getpid()}.tmp", ".notes.tmp", "c.jpg"]
    for name in (*left, *others):
        (out / name).touch()
    predict(predictor, [], out)
    assert sorted(os.listdir(out)) == sorted([*others, "detections.json", "detections.jsonl"])


def test_results_are_built_with_one_record_in_memory_at_a_time(tmp_path: Path) -> None:
    found = {"category_id": 1, "category_name": "x", "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    with (tmp_path / "detections.jsonl").open("w") as file:
        for i in range(800):
            file.write(json.dumps({"image_id": i, "file_name": f"{i}.png", "detections": [found] * 20}) + "\n")
    tracemalloc.start()
    write_results(tmp_path / "detections.jsonl", tmp_path / "detections.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "detections.json").stat().st_size > 1_600_000
    assert peak < 500_000
    assert len(results_of(tmp_path)) == 16_000


def test_the_summary_of_many_odd_files_is_short(predictor: Predictor, inputs: Path, tmp_path: Path) -> None:
    for i in range(50):
        (inputs / f"{'long' * 50}{i}.png").write_bytes(b"no image")
    summary = predict(predictor, find_images([str(inputs)]), tmp_path / "out")
    report = summary.report()
    assert report.count("error: ") == 1
    assert "error: 50 inputs are unreadable:" in report
    assert "and 40 more; detections.jsonl has the reason of each" in report
    assert len(report) <= 4000


def test_the_time_left_is_shown_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=20)
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with CountProgress("predicting", 10_000) as progress:
        for done in range(1, 4):
            progress.update(done, 10_000)
    assert capsys.readouterr().err == "predicting: 2 of 10,000, about 55:32:40 left\n"


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "\ud800", "~nobody/x"])
def test_inputs_that_are_no_names_are_reported(text: str) -> None:
    with pytest.raises(InputError, match="no file, folder or glob with matches") as raised:
        find_images([text])
    assert len(str(raised.value)) < 1000
    assert str(raised.value).replace("\n", "").isprintable()


def test_many_inputs_without_images_give_a_short_error() -> None:
    with pytest.raises(InputError, match="and 988 more") as raised:
        find_images([f"nothing{i}" for i in range(1000)])
    assert len(str(raised.value)) < 4000


def test_links_that_lead_in_circles_repeat_no_image(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png")
    (folder / "again").symlink_to(folder)
    assert find_images([f"{folder}/**/*.png"]) == [folder / "a.png"]
    (folder / "other.png").symlink_to(folder / "a.png")
    assert len(find_images([f"{folder}/**/*.png"])) == 2


def test_an_odd_pil_image_is_an_input_error(predictor: Predictor) -> None:
    content = io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(content, "PNG")
    damaged = content.getvalue()[:45] + b"\xff" * 20 + content.getvalue()[65:]
    with pytest.raises(InputError, match="got one that cannot be decoded"):
        predictor(Image.open(io.BytesIO(damaged)))


def test_a_real_process_is_ended_by_a_pipe_of_nobody_at_the_end_only(whole: Run, inputs: Path, tmp_path: Path) -> None:
    """`predict ... | head -0` still writes its results."""
    argv = [
        "--checkpoint",
        str(whole.out / "checkpoints" / "best.pt"),
        str(inputs),
        "--output-dir",
        str(tmp_path / "o"),
    ]
    code = (
        "import sys\nfrom detector.models.resnet import ARCHITECTURES, Architecture\n"
        "ARCHITECTURES['resnet18'] = Architecture(False, (1, 1, 1, 1))\n"
        f"from tools.predict import main\nsys.exit(main({argv!r}))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        timeout=120,
        check=False,
    )
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(results_of(tmp_path / "o")) >= 0
