"""The files that an evaluation writes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from detector.config_yaml import load_config
from detector.errors import RunError
from detector.evaluation.score import score_checkpoint
from tests.conftest import Run
from tests.reliability.faults import FaultyDisk, faulty_disk


@pytest.mark.parametrize("part", ["detections.json", "metrics.json"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_disk_that_fails_leaves_the_results_of_one_evaluation_or_none(
    part: str, earlier: bool, whole: Run, tmp_path: Path
) -> None:
    checkpoint, out = whole.out / "checkpoints" / "best.pt", tmp_path / "out"
    before = {}
    if earlier:
        score_checkpoint(
            load_config(whole.config, ["postprocess.score_thresh=0"]), checkpoint, split="val", output_dir=out
        )
        before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = load_config(whole.config, ["postprocess.score_thresh=0", "postprocess.detections_per_img=1"])
    with faulty_disk(FaultyDisk(part, first=0, number=errno.ENOSPC)), pytest.raises(RunError, match="No space left"):
        score_checkpoint(other, checkpoint, split="val", output_dir=out)
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    if part == "detections.json":
        assert after == before
    else:
        assert list(after) == ["detections.json"]
        assert after["detections.json"] != before.get("detections.json")
        assert isinstance(json.loads(after["detections.json"]), list)
