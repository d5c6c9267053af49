"""What a step of any shape costs: exact where each block has its price, whatever it does."""

import itertools

import pytest

from bench.costs import PARTS, Costs, Shape, anchors
from blocksched.schedules import Plan

TRAINS, PASSES, FORWARD = 30.0, 20.0, 10.0  # a block above the boundary; frozen there; below it
STEM, STEM_FORWARD, HEAD, UPDATE = 7.0, 3.0, 5.0, 2.0


def price(name: str, plan: Plan, n: int) -> float:
    """A part of a step, block by block."""
    active, stem = set(plan.active), plan.stem_trains
    running = range(n) if plan.running is None else plan.running
    if name == "head":
        return HEAD
    if name == "update":
        return UPDATE * len(active)
    total = 0.0 if (name == "suffix") != stem else STEM if stem else STEM_FORWARD
    for block in running:
        below = block < min(active) and not stem
        if below == (name == "stem and prefix"):
            total += FORWARD if below else TRAINS if block in active else PASSES
    return total


def costs(n: int) -> Costs:
    parts = {
        (name, shape): price(name, plan, n) for shape, plan in anchors(n).items() for name in PARTS
    }
    return Costs(n, parts)


def plans(n: int):
    """Every active set, with the stem and without, of all blocks and of fewer."""
    for k in range(1, n + 1):
        for running in itertools.combinations(range(n), k):
            for many in range(1, k + 1):
                for active in itertools.combinations(running, many):
                    yield Plan(active, running=None if k == n else running)
                    yield Plan(active, stem=True, running=running)


@pytest.mark.parametrize("n", [4, 5, 8])
def test_every_plan_costs_what_its_blocks_do(n):
    made = costs(n)
    for plan in plans(n) if n < 8 else itertools.islice(plans(n), 0, None, 7):
        shape = Shape.of(plan, n)
        for name in PARTS:
            assert made.part_ms(name, shape) == pytest.approx(price(name, plan, n)), (name, plan)
        assert made.step_ms(shape) == pytest.approx(sum(price(name, plan, n) for name in PARTS))


def test_a_shape_is_what_a_plan_does():
    assert Shape.of(Plan((2, 3)), 4) == Shape(2, 2) == Shape.suffix(2, 4)
    assert Shape.of(Plan((0, 1, 2, 3)), 4) == Shape(0, 4, stem=True) == Shape.suffix(4, 4)
    assert Shape.of(Plan((1, 3)), 6) == Shape(1, 2, 3)
    assert Shape.of(Plan((1, 3), stem=True), 6) == Shape(0, 2, 4, stem=True)
    assert Shape.of(Plan((0, 2), running=(0, 2, 5)), 6) == Shape(0, 2, 1, stem=True)
    assert Shape.of(Plan((2,), running=(0, 2)), 6) == Shape(1, 1)
    every = Plan(tuple(range(6)), lower=4, rows=0.25)
    assert Shape.of(every, 6) == Shape(0, 6, stem=True, lower=4, rows=0.25)


def test_anchors():
    assert list(anchors(8)) == [
        Shape(6, 2), Shape(4, 4), Shape(2, 6), Shape(0, 8, stem=True),
        Shape(0, 2, 6, stem=True), Shape(0, 2, stem=True),
    ]  # fmt: skip
    assert anchors(8)[Shape(0, 2, 6, stem=True)].active == (3, 7)
    assert anchors(8)[Shape(0, 2, stem=True)].running == (0, 1)
    assert list(anchors(1)) == [Shape(0, 1, stem=True)]


def test_rows_that_the_lower_blocks_leave_out_run_there_without_a_graph():
    whole, lower = Plan(tuple(range(8)), lower=6, rows=0.25), Plan((6, 7))
    below = 0.25 * (STEM + 6 * TRAINS) + 0.75 * (STEM_FORWARD + 6 * FORWARD)
    assert costs(8).step_ms(Shape.of(whole, 8)) == below + 2 * TRAINS + HEAD + 8 * UPDATE
    assert costs(8).step_ms(Shape.of(lower, 8)) == (
        STEM_FORWARD + 6 * FORWARD + 2 * TRAINS + HEAD + 2 * UPDATE
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_blocks(n):
    for k in range(1, n + 1):
        plan = Plan(tuple(range(n - k, n)))
        assert costs(n).step_ms(Shape.suffix(k, n)) == sum(price(name, plan, n) for name in PARTS)
