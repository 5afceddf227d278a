"""The images of each step: each once per epoch, the same for all processes, from any step of the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.datasets.sampling import (
    SampleKey,
    StepPlanner,
    TrainSampler,
    balanced_factors,
    eval_batches,
    repeat_factors,
)
from detector.datasets.transforms import padded_size, resized_size


def planner(num_images: int = 23, batch_size: int = 4, **changes: Any) -> StepPlanner:
    """A planner of images of three alternating shapes: landscape, portrait, square."""
    shapes = np.array([(300, 400), (400, 300), (200, 200)])
    arguments: dict[str, Any] = {
        "min_sizes": (100, 200, 300), "max_size": 500, "pad": "multiple_128", "aspect_ratio_grouping": False, "seed": 3,
    }  # fmt: skip
    return StepPlanner(shapes[np.arange(num_images) % 3], batch_size, **(arguments | changes))


def steps_of(sampler: TrainSampler) -> list[list[list[SampleKey]]]:
    """Micro-batches of a rank, grouped by step."""
    batches = iter(sampler)
    steps = []
    for step in range(sampler.start_step, sampler.total_steps):
        epoch, within = divmod(step, sampler.planner.steps_per_epoch)
        count = sampler.num_micro_batches(len(sampler.planner.epoch(epoch)[within]))
        steps.append([next(batches) for _ in range(count)])
    assert next(batches, None) is None
    return steps


def without_fillers(micro_batches: list[list[SampleKey]]) -> list[SampleKey]:
    return [key for micro_batch in micro_batches for key in micro_batch if key.index >= 0]


@given(
    num_images=st.integers(1, 60), batch_size=st.integers(1, 9), epoch=st.integers(0, 5), grouped=st.booleans(),
)  # fmt: skip
def test_an_epoch_holds_every_image_exactly_once_and_keeps_the_partial_batch(
    num_images: int, batch_size: int, epoch: int, grouped: bool
) -> None:
    plan = planner(num_images, batch_size, aspect_ratio_grouping=grouped)
    steps = plan.epoch(epoch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(num_images))
    assert len(steps) == plan.steps_per_epoch == -(-num_images // batch_size)
    full = [len(step) for step in steps if len(step) == batch_size]
    assert len(full) >= len(steps) - 1


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int, plan: StepPlanner | None = None) -> list[int]:
        plan = plan or planner(seed=seed)
        return [int(i) for step in plan.epoch(epoch) for i in step]

    used = planner(seed=3)
    for epoch in (5, 2, 0):
        used.epoch(epoch)
    np.random.seed(99)
    assert order(3, 2) == order(3, 2, used)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1, 2)}) == 6


def test_a_grouped_step_is_all_portrait_or_all_landscape_but_for_the_leftovers() -> None:
    plan = planner(100, 8, aspect_ratio_grouping=True)
    portrait = plan.sizes[:, 0] > plan.sizes[:, 1]
    for epoch in range(3):
        mixed = [step for step in plan.epoch(epoch) if 0 < portrait[step].sum() < len(step)]
        assert len(mixed) <= 1
    ungrouped = planner(100, 8)
    assert sum(0 < portrait[step].sum() < len(step) for step in ungrouped.epoch(0)) > 5


def test_the_step_of_leftovers_is_not_always_the_last() -> None:
    plan = planner(23, 4)
    at = {next(i for i, step in enumerate(plan.epoch(e)) if len(step) == 3) for e in range(12)}
    assert len(at) > 2


def test_a_step_has_one_scale_and_a_canvas_that_all_its_images_fit() -> None:
    plan = planner()
    scales = set()
    for epoch in range(4):
        for number, indices in enumerate(plan.epoch(epoch)):
            keys = plan.keys(epoch, number, indices)
            assert len({(key.min_size, key.canvas) for key in keys}) == 1
            scales.add(keys[0].min_size)
            resized = np.array(
                [resized_size((h, w), min_size=keys[0].min_size, max_size=500) for h, w in plan.sizes[indices]]
            )
            assert keys[0].canvas == padded_size((resized[:, 0].max(), resized[:, 1].max()), "multiple_128")
    assert scales == {100, 200, 300}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, None), (1, 1), (1, 3), (2, None), (2, 1), (3, 2), (8, None)]
)
def test_processes_and_micro_batches_partition_the_step_and_change_no_sample(
    world_size: int, micro_batch: int | None, grouped: bool
) -> None:
    plan = planner(23, 4, aspect_ratio_grouping=grouped)
    total = 2 * plan.steps_per_epoch
    alone = steps_of(TrainSampler(plan, 0, total))
    all_ranks = [
        steps_of(TrainSampler(plan, 0, total, micro_batch=micro_batch, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    for whole, *parts in zip(alone, *all_ranks, strict=True):
        together = [key for part in parts for key in without_fillers(part)]
        assert sorted(together) == sorted(without_fillers(whole))
        assert len({len(part) for part in parts}) == 1, "every process must run the same number of forward passes"
        if micro_batch is not None:
            assert max(len(batch) for part in parts for batch in part) <= micro_batch
        for part in parts:
            assert all(part), "no forward pass without an image"
            assert {key.canvas for batch in part for key in batch} == {whole[0][0].canvas}
            assert len(without_fillers(part)) in (len(together) // world_size, -(-len(together) // world_size))


def test_a_process_without_images_gets_a_filler() -> None:
    plan = planner(1, 4)
    (step,) = steps_of(TrainSampler(plan, 0, 1, rank=1, world_size=2))
    assert [[key.index for key in batch] for batch in step] == [[-1]]


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 18), micro_batch=st.sampled_from([None, 1, 3]), world_size=st.integers(1, 3))
def test_a_sampler_that_starts_late_gives_the_tail_of_the_whole_run(
    start: int, micro_batch: int | None, world_size: int
) -> None:
    plan = planner()
    total = 3 * plan.steps_per_epoch
    for rank in range(world_size):
        whole = steps_of(TrainSampler(plan, 0, total, micro_batch=micro_batch, rank=rank, world_size=world_size))
        late = steps_of(TrainSampler(plan, start, total, micro_batch=micro_batch, rank=rank, world_size=world_size))
        assert late == whole[start:]


@given(num_images=st.integers(0, 40), batch_size=st.integers(1, 7))
def test_evaluation_sees_every_image_once_in_batches_of_one_padded_shape(num_images: int, batch_size: int) -> None:
    sizes = planner(num_images).sizes
    batches = eval_batches(sizes, batch_size, min_size=200, max_size=500, pad="batch_max_32")
    assert sorted(key.index for batch in batches for key in batch) == list(range(num_images))
    for batch in batches:
        assert 0 < len(batch) <= batch_size
        for key in batch:
            height, width = (int(side) for side in sizes[key.index])
            alone = padded_size(resized_size((height, width), min_size=200, max_size=500), "batch_max_32")
            assert key.canvas == alone, "padded as if it were alone"


# Of six images: the first has classes 0 and 2, the next three class 0 only, the fifth class 1 twice, the last none.
IMAGES = np.array([0, 0, 1, 2, 3, 4, 4])
LABELS = np.array([0, 2, 0, 0, 0, 1, 1])


def test_repeat_factors_are_lvis() -> None:
    """Shares of images: class 0 in 4 of 6, classes 1 and 2 in 1 of 6."""
    found = repeat_factors(IMAGES, LABELS, 6, threshold=0.5)
    rare = np.sqrt(0.5 / (1 / 6))
    np.testing.assert_allclose(found, [rare, 1, 1, 1, rare, 1])
    assert (repeat_factors(IMAGES, LABELS, 6, threshold=1e-9) == 1).all()
    assert repeat_factors(IMAGES[:0], LABELS[:0], 3, threshold=0.5).tolist() == [1, 1, 1]


def test_balanced_factors_draw_every_class_equally_often() -> None:
    found = balanced_factors(IMAGES, LABELS, 6)
    third = 5 / 3
    np.testing.assert_allclose(found, [third + third / 4, third / 4, third / 4, third / 4, third, 1])
    assert found.sum() == pytest.approx(6)
    assert balanced_factors(IMAGES[:0], LABELS[:0], 3).tolist() == [1, 1, 1]


@given(st.lists(st.floats(0, 4), min_size=1, max_size=40), st.integers(0, 1000), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_all_epochs_have_the_same_length_and_repetitions_differ_from_the_factor_by_less_than_one(
    factors: list[float], seed: int, batch_size: int
) -> None:
    array = np.array(factors)
    if round(array.sum()) == 0:
        array[0] += 1
    plan = planner(len(array), batch_size, seed=seed, factors=array)
    assert plan.images_per_epoch == round(array.sum())
    exact = array * plan.images_per_epoch / array.sum()
    for epoch in range(3):
        entries = np.concatenate(plan.epoch(epoch))
        assert len(plan.epoch(epoch)) == plan.steps_per_epoch
        assert len(entries) == plan.images_per_epoch
        assert len(np.unique(entries)) == len(entries), "copies are distinguishable"
        times = np.bincount(entries % len(array), minlength=len(array))
        assert (np.abs(times - exact) < 1 + 1e-6).all()
        copies = [sorted(entries[entries % len(array) == i] // len(array)) for i in range(len(array))]
        assert all(c == list(range(len(c))) for c in copies)


def test_over_many_epochs_the_average_repetitions_equal_the_factors() -> None:
    factors = np.array([0.5, 1.0, 2.25, 1.25, 1.0])
    plan = planner(5, 2, factors=factors)
    times = sum(np.bincount(np.concatenate(plan.epoch(e)) % 5, minlength=5) for e in range(2000))
    np.testing.assert_allclose(times / 2000, factors, atol=0.05)


def test_repetitions_depend_on_seed_and_epoch_only_and_copies_are_numbered() -> None:
    factors = np.array([3.0, 1.0, 1.0])
    one, other = (planner(3, 5, factors=factors, seed=4) for _ in range(2))
    assert [e.tolist() for e in one.epoch(7)] == [e.tolist() for e in other.epoch(7)]
    (step,) = one.epoch(7)
    keys = one.keys(7, 0, step)
    assert sorted((k.index, k.copy) for k in keys) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
