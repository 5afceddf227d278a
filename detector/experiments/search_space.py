"""What a sweep is to try: recipes, settings and their values, seeds and folds; checked before anything is trained."""

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
from detector.training.resume import MAY_CHANGE_ON_RESUME


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included."""

    low: float
    high: float
    log: bool
    whole: bool

    def holds(self, value: object) -> bool:
        """Whether it is a number between the ends."""
        return isinstance(value, int | float) and self.low <= value <= self.high


Space = Mapping[str, tuple[str, ...] | Range]
"""By config key: the values to try, as they would stand on the command line, or a range."""
RECIPE = "config"
"""Among the settings of a trial, which recipe it starts from."""


@dataclass(frozen=True)
class Plan:
    """What a sweep is to find out."""

    recipes: Mapping[str, Path]
    """By name."""
    overrides: Sequence[str] = ()
    """`key=value`, for all runs."""
    space: Space = field(default_factory=dict)
    search: Literal["grid", "random", "tpe"] = "grid"
    trials: int = 0
    """Of random and tpe; a grid has as many as it has."""
    seeds: int = 1
    """train.seed 0, 1, ..."""
    folds: int = 0
    """Of data.train; 0: none, data.val is what is measured by."""

    @property
    def dimensions(self) -> dict[str, tuple[str, ...] | Range]:
        """The space, with the recipes where there are several."""
        return {**({RECIPE: tuple(self.recipes)} if len(self.recipes) > 1 else {}), **self.space}

    def points(self) -> list[dict[str, Any]]:
        """Every trial of a grid; of ranges, their ends."""
        choices = [v if isinstance(v, tuple) else (v.low, v.high) for v in self.dimensions.values()]
        return [dict(zip(self.dimensions, point, strict=True)) for point in itertools.product(*choices)]

    def usual(self) -> dict[str, Any] | None:
        """The recipe as it is, if there is but one and it lies in the space."""
        if len(self.recipes) > 1:
            return None
        recipe = self.config_of({})
        settings, point = flatten(recipe.model_dump()), {}
        for key, values in self.space.items():
            if isinstance(values, Range):
                same = settings.get(key) if values.holds(settings.get(key)) else None
            else:
                same = next((value for value in values if self.config_of({key: value}) == recipe), None)
            if same is None:
                return None
            point[key] = same
        return point

    def units(self) -> list[Unit]:
        """The runs of a trial, in order."""
        folds = range(self.folds) if self.folds else (None,)
        return [Unit(seed, fold) for seed in range(self.seeds) for fold in folds]

    def config_of(self, params: Mapping[str, Any]) -> Config:
        """The config of a trial, before seed and fold."""
        return load_config(self.recipe_of(params), self.overrides_of(params))

    def recipe_of(self, params: Mapping[str, Any]) -> Path:
        """The recipe that a trial starts from."""
        return self.recipes[params.get(RECIPE, next(iter(self.recipes)))]

    def overrides_of(self, params: Mapping[str, Any]) -> list[str]:
        """What a trial says on the command line."""
        return [*self.overrides, *(f"{key}={value}" for key, value in params.items() if key != RECIPE)]

    def name_of(self, params: Mapping[str, Any]) -> str:
        """A trial's name, fit for a folder."""
        last = [key.rpartition(".")[2] for key in self.space]
        parts = [params[RECIPE]] if RECIPE in params else []
        for key, short in zip(self.space, last, strict=True):
            value = params[key]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{short if last.count(short) == 1 else key}={shown}")
        name = ",".join(parts) or next(iter(self.recipes))
        return re.sub(r"[^\w.=,+-]+", "_", name)[:120]


class Unit(NamedTuple):
    """One run of a trial."""

    seed: int
    fold: int | None

    @property
    def name(self) -> str:
        """Of its folder; what pairs it with the runs of other trials."""
        return f"seed{self.seed}" + (f"_fold{self.fold}" if self.fold is not None else "")


def read_space(texts: Sequence[str], *, ranges: bool) -> dict[str, tuple[str, ...] | Range]:
    """`loss.gamma=0,1,2` and, where ranges may be, `optim.lr=1e-4..1e-2:log`. Lists in brackets are one value.

    Raises:
        ConfigError: everything that cannot be read.
    """
    space: dict[str, tuple[str, ...] | Range] = {}
    mistakes = []
    for text in texts:
        key, sign, values = text.partition("=")
        low, dots, high = values.removesuffix(":log").partition("..")
        if not sign or not key or not values:
            mistakes.append(f"{text!r} must be key=value,value,... or key=low..high, optionally with :log")
        elif key in space:
            mistakes.append(f"{key} stands twice")
        elif not dots:
            listed = space[key] = tuple(part.strip() for part in re.split(r",(?![^\[{]*[\]}])", values))
            if len(set(listed)) < len(listed):
                mistakes.append(f"{text!r} must name each value once")
        elif not ranges:
            mistakes.append(f"{text!r} is a range, which a grid cannot try all of; list values, or use --search")
        else:
            try:
                ends = float(low), float(high)
            except ValueError:
                ends = (0.0, 0.0)
            log, whole = values.endswith(":log"), not re.search(r"[.eE]", low + high)
            if not ends[0] < ends[1] or (log and ends[0] <= 0):
                mistakes.append(
                    f"{text!r} must be two ascending numbers, above 0 with :log, as optim.lr=1e-4..1e-2:log"
                )
            elif whole:
                space[key] = Range(int(low), int(high), log, whole)
            else:
                space[key] = Range(*ends, log, whole)
    if mistakes:
        raise ConfigError("\n".join(["the search space has mistakes:", *(f"  {m}" for m in mistakes)]))
    return space


def settle(plan: Plan) -> Plan:
    """Check every config that a plan leads to, before the first run; ranges of a number that need not be whole are not.

    Raises:
        ConfigError: unknown keys, values that do not fit, recipes that are not scored on the same data.
    """
    reserved = [key for key in plan.space if re.match(r"train\.seed$|data\.(train|val|test)\b", key)]
    reserved += [text for text in plan.overrides if text.startswith("train.seed=")]
    if reserved:
        raise ConfigError(
            f"{', '.join(reserved)} must not be set or searched: --seeds gives train.seed 0, 1, ..., and all trials must "
            "learn from and be measured by the same data"
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
    mistakes: dict[str, None] = {}
    for params in plan.points():
        try:
            plan.config_of(params)
        except ConfigError as error:
            mistakes.update(dict.fromkeys(str(error).splitlines()[1:] or [str(error)]))
    if mistakes:
        raise ConfigError("\n".join(["some of these configs have mistakes:", *mistakes]))
    measured = "train" if plan.folds else "val"
    sets: dict[str, str] = {}
    for name, path in plan.recipes.items():
        split: SplitConfig | None = getattr(load_config(path, plan.overrides).data, measured)
        if split is None:
            raise ConfigError(
                f"data.{measured} must name images and annotations in {path}: trials are compared by what they score there"
                + (" (or use --folds, which divides data.train)" if measured == "val" else "")
            )
        sets.setdefault(_digest(split), name)
    if len(sets) > 1:
        raise ConfigError(
            f"all recipes must have the same data.{measured}, got different annotations in {', '.join(sets.values())}"
        )
    return plan


def _digest(split: SplitConfig | None) -> str:
    path = Path(split.annotations) if split is not None else None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None and path.is_file() else str(split)


def definition_of(plan: Plan) -> dict[str, Any]:
    """What makes two sweeps the same study: recipes, data by content, space, seeds and folds. More trials may be added."""
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
        values = {**flatten(config.model_dump(exclude={"data": {"train", "val", "test"}})), **data}
        definition |= {f"{name}: {k}": v for k, v in values.items() if not k.startswith(MAY_CHANGE_ON_RESUME)}
    plain: dict[str, Any] = json.loads(json.dumps(definition))
    return plain
