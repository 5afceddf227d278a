"""How far apart two ways of doing the same steps end, for several seeds: with ReLUs, without their kinks, in double
precision.

    OMP_NUM_THREADS=1 python -m tests.oracles.kinks --seeds 0 1 2 3 4 5 6 7

40 runs of 20 steps each way, twice over, in some 20 minutes. A figure is the largest difference of a weight as a share
of what `tests/training/test_distributed.py` allows it; `largest` is the largest as a share of its tensor's largest
entry.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import torch

from tests.tiny import last_checkpoint
from tests.training import test_distributed as runs

WAYS = {
    "ReLU": runs.train_as_it_is,
    "without kinks": runs.train_without_kinks,
    "double precision": runs.train_in_double,
}

CASES = {
    "frozen_bn, two processes": ("frozen_bn", "global", 2, ()),
    "gn, two processes": ("gn", "global", 2, ()),
    "frozen_bn, per_image, two processes, parts of 1": ("frozen_bn", "per_image", 2, ("train.micro_batch=1",)),
    "gn, per_image, two processes, parts of 1": ("gn", "per_image", 2, ("train.micro_batch=1",)),
    "gn, one process, parts of 1": ("gn", "global", 1, ("train.micro_batch=1",)),
}


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data, backbone = runs.write_many(root / "many"), runs.write_backbone(root)
        for way in options.ways:
            for case, (norm, normalizer, world_size, settings) in CASES.items():
                for seed in options.seeds:
                    place = root / f"{way}-{case}-{seed}".replace(" ", "")
                    place.mkdir()
                    chosen = {"loss__normalizer": normalizer, "train__seed": seed}
                    config = runs.one_epoch(place, data, **runs.norm_settings(norm, backbone), **chosen)
                    with contextlib.redirect_stdout(io.StringIO()):
                        one, other = runs.trained_both_ways(WAYS[way], config, world_size, settings)
                    a, b = last_checkpoint(one).model, last_checkpoint(other).model
                    share = max(float(((a[k] - b[k]).abs() / runs.allowed(b[k])).max()) for k in a)
                    largest = max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)) for k in a)
                    shutil.rmtree(place)
                    print(
                        f"{way}; {case}; seed {seed}: {share:.3f} of what is allowed, largest {largest:.1e}", flush=True
                    )


if __name__ == "__main__":
    main()
