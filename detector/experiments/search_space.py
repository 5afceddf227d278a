"""What a sweep tries: recipes, settings with their values, seeds and folds, all checked before any training."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from detector.config import Config, SplitConfig, flatten
from detector.config_yaml import load_config
from detector.errors import ConfigError
from detector.files import read_bytes
from detector.text import MAX_MESSAGE, as_many_as_fit
from detector.training.resume import MAY_CHANGE_ON_RESUME


@dataclass(frozen=True)
class Range:
    """An interval of numbers, both ends included."""

    low: float
    high: float
    log: bool
    """Whether to search on a logarithmic scale."""
    whole: bool
    """Whether only integers are in it."""

    def contains(self, value: object) -> bool:
        """Whether a value is a number between the ends."""
        return isinstance(value, int | float) and self.low <= value <= self.high


Values = tuple[str, ...] | Range
"""Values of a setting as on the command line, or a range."""
CONFIG_DIMENSION = "config"
"""Parameter of a trial that selects the recipe, if there are several."""


class RunKey(NamedTuple):
    """Identifies a run of a trial."""

    seed: int
    fold: int | None

    @property
    def name(self) -> str:
        """Name of the run's folder. Runs of different trials with the same name are compared in pairs."""
        return f"seed{self.seed}" + (f"_fold{self.fold}" if self.fold is not None else "")


@dataclass(frozen=True)
class SweepPlan:
    """The trials of a sweep, and the runs of each trial."""

    recipes: Mapping[str, Path]
    """Config files by name."""
    overrides: Sequence[str] = ()
    """`key=value`, for all runs."""
    space: Mapping[str, Values] = field(default_factory=dict)
    """Values to try, by config key."""
    search: Literal["grid", "random", "tpe"] = "grid"
    trials: int = 0
    """Number of trials of a random or tpe search."""
    seeds: int = 1
    """Number of values of train.seed: 0, 1, ..."""
    folds: int = 0
    """Number of cross-validation folds of data.train; 0 to validate on data.val."""

    @property
    def dimensions(self) -> dict[str, Values]:
        """The space, with the recipes as a dimension if there are several."""
        return {**({CONFIG_DIMENSION: tuple(self.recipes)} if len(self.recipes) > 1 else {}), **self.space}

    def points(self) -> list[dict[str, Any]]:
        """All combinations of values; of a range, only its ends."""
        choices = [v if isinstance(v, tuple) else (v.low, v.high) for v in self.dimensions.values()]
        return [dict(zip(self.dimensions, point, strict=True)) for point in itertools.product(*choices)]

    def unchanged_point(self) -> dict[str, Any] | None:
        """The point of the space that equals the recipe; None if it lies outside or there are several recipes."""
        if len(self.recipes) > 1:
            return None
        recipe = self.config({})
        settings, point = flatten(recipe.model_dump()), {}
        for key, values in self.space.items():
            if isinstance(values, Range):
                same = settings.get(key) if values.contains(settings.get(key)) else None
            else:
                same = next((value for value in values if self.config({key: value}) == recipe), None)
            if same is None:
                return None
            point[key] = same
        return point

    def run_keys(self) -> list[RunKey]:
        """The runs of a trial, in the order in which they start."""
        folds = range(self.folds) if self.folds else (None,)
        return [RunKey(seed, fold) for seed in range(self.seeds) for fold in folds]

    def config(self, params: Mapping[str, Any]) -> Config:
        """The config of a trial, without seed and fold."""
        return load_config(self.recipe(params), self.trial_overrides(params))

    def recipe(self, params: Mapping[str, Any]) -> Path:
        """The config file of a trial."""
        return self.recipes[params.get(CONFIG_DIMENSION, next(iter(self.recipes)))]

    def trial_overrides(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a trial: those for all runs, and its parameters."""
        return [*self.overrides, *(f"{key}={value}" for key, value in params.items() if key != CONFIG_DIMENSION)]

    def trial_name(self, params: Mapping[str, Any]) -> str:
        """A short name of a trial that is valid as a folder name."""
        last = [key.rpartition(".")[2] for key in self.space]
        parts = [params[CONFIG_DIMENSION]] if CONFIG_DIMENSION in params else []
        for key, short in zip(self.space, last, strict=True):
            value = params[key]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{short if last.count(short) == 1 else key}={text}")
        name = ",".join(parts) or next(iter(self.recipes))
        return re.sub(r"[^\w.=,+-]+", "_", name)[:120]


def parse_space(texts: Sequence[str], *, ranges: bool) -> dict[str, Values]:
    """Parse `loss.gamma=0,1,2` and, if ranges are allowed, `optim.lr=1e-4..1e-2:log`. A list in brackets is one value.

    Raises:
        ConfigError: all texts that cannot be parsed.
    """
    space: dict[str, Values] = {}
    errors = []
    for text in texts:
        key, sign, values = text.partition("=")
        low, dots, high = values.removesuffix(":log").partition("..")
        if not sign or not key or not values:
            errors.append(f"{text!r} must be key=value,value,... or key=low..high, optionally with :log")
        elif key in space:
            errors.append(f"{key} must be given once, got it twice")
        elif not dots:
            listed = space[key] = tuple(part.strip() for part in re.split(r",(?![^\[{]*[\]}])", values))
            if len(set(listed)) < len(listed):
                errors.append(f"{text!r} must name each value once")
        elif not ranges:
            errors.append(f"{text!r} must be a list of values in a grid, got a range; list values, or use --search")
        else:
            try:
                ends = float(low), float(high)
            except ValueError:
                ends = (0.0, 0.0)
            log, whole = values.endswith(":log"), not re.search(r"[.eE]", low + high)
            if not ends[0] < ends[1] or (log and ends[0] <= 0):
                errors.append(
                    f"{text!r} must be two ascending numbers, above 0 with :log, e.g. optim.lr=1e-4..1e-2:log"
                )
            elif whole:
                space[key] = Range(int(low), int(high), log, whole)
            else:
                space[key] = Range(*ends, log, whole)
    if errors:
        raise ConfigError("\n".join(["the search space is invalid:", *(f"  {error}" for error in errors)]))
    return space


def validate_plan(plan: SweepPlan) -> SweepPlan:
    """Check all configs of a plan before the first run, and search integers only where a setting must be one.

    Returns:
        The plan, in which ranges of integers have become continuous where the setting allows fractions.

    Raises:
        ConfigError: unknown keys, invalid values, or recipes with different validation data.
    """
    reserved = [key for key in plan.space if re.match(r"train\.seed$|data\.(train|val|test)\b", key)]
    reserved += [text for text in plan.overrides if text.startswith("train.seed=")]
    if reserved:
        raise ConfigError(
            f"{', '.join(reserved)} must not be set or searched: --seeds gives train.seed 0, 1, ..., and all trials "
            "must have the same training and validation data"
        )
    twice = [text for text in plan.overrides if text.partition("=")[0] in plan.space]
    if twice:
        raise ConfigError(f"{', '.join(twice)} must be either searched or set for all, not both")
    first = next(iter(plan.recipes.values()))
    space = dict(plan.space)
    for key, values in plan.space.items():
        if isinstance(values, Range) and values.whole:
            with contextlib.suppress(ConfigError):
                load_config(first, [*plan.overrides, f"{key}={values.low + 0.5}"])
                space[key] = Range(float(values.low), float(values.high), values.log, False)
    plan = dataclasses.replace(plan, space=space)
    errors: dict[str, None] = {}
    for params in plan.points():
        try:
            plan.config(params)
        except ConfigError as error:
            errors.update(dict.fromkeys(str(error).splitlines()[1:] or [str(error)]))
    if errors:
        lines = as_many_as_fit(list(errors), MAX_MESSAGE - 100)
        raise ConfigError("\n".join(["some configs of the sweep are invalid:", *lines]))
    _require_same_data(plan)
    return plan


def _require_same_data(plan: SweepPlan) -> None:
    measured = "train" if plan.folds else "val"
    recipe_of: dict[str, str] = {}
    for name, path in plan.recipes.items():
        split: SplitConfig | None = getattr(load_config(path, plan.overrides).data, measured)
        if split is None:
            raise ConfigError(
                f"data.{measured} must name images and annotations in {path}: trials are compared by their AP on it"
                + (" (or use --folds, which divides data.train)" if measured == "val" else "")
            )
        recipe_of.setdefault(_digest(split), name)
    if len(recipe_of) > 1:
        names = ", ".join(recipe_of.values())
        raise ConfigError(f"all recipes must have the same data.{measured}, got different annotations in {names}")


def _digest(split: SplitConfig | None) -> str:
    path = Path(split.annotations) if split is not None else None
    return hashlib.sha256(read_bytes(path)).hexdigest()[:16] if path is not None and path.is_file() else str(split)


def study_definition(plan: SweepPlan) -> dict[str, Any]:
    """What identifies a study: recipes, content of the data, space, seeds, folds. The number of trials may change."""
    definition: dict[str, Any] = {
        "search": plan.search, "seeds": plan.seeds, "folds": plan.folds,
        **{
            f"space.{key}": values if isinstance(values, tuple) else vars(values)
            for key, values in plan.dimensions.items()
        },
    }  # fmt: skip
    for name, path in plan.recipes.items():
        config = load_config(path, plan.overrides)
        data = {split: _digest(getattr(config.data, split)) for split in ("train", "val", "test")}
        settings = {**flatten(config.model_dump(exclude={"data": {"train", "val", "test"}})), **data}
        definition |= {f"{name}: {k}": v for k, v in settings.items() if not k.startswith(MAY_CHANGE_ON_RESUME)}
    as_json: dict[str, Any] = json.loads(json.dumps(definition))
    return as_json
