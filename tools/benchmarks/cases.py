"""The cases of `tools/benchmark.py`. Each first checks that both implementations compute the same, then times them."""

from __future__ import annotations

from collections.abc import Callable

from tools.benchmarks.components import loss, match
from tools.benchmarks.inference import infer, postprocessing
from tools.benchmarks.pipeline import eval_case, loader_case, open_case
from tools.benchmarks.rows import Options, Row
from tools.benchmarks.training import feed, train

CASES: dict[str, Callable[[Options], list[Row]]] = {
    "train": train, "infer": infer, "loss": loss, "match": match, "postprocess": postprocessing, "loader": loader_case,
    "eval": eval_case, "open": open_case, "feed": feed,
}  # fmt: skip
