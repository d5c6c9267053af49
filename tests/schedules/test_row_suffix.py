"""row_suffix: every block on every step, the lower ones on a share of the rows."""

import dataclasses
import math

import pytest

from blocksched.schedules import Progress, Reading
from blocksched.schedules.row_suffix import RowSuffix


@pytest.mark.parametrize("n", range(1, 19))
def test_every_step_of_every_run(n):
    for active in range(1, n + 1):
        for rows in (1e-9, 0.25, 1.0):
            schedule = RowSuffix(active=active, rows=rows)
            state = schedule.init(n)
            for step in (0, 1, 7, 10**6):
                progress = Progress(step, 10, 3.0 * step, 5.0)
                assert schedule.wants(state, progress) == frozenset()
                plan = schedule.plan(state, progress)
                # All that a plan can say, so that what it should not say is seen too.
                assert dataclasses.asdict(plan) == {
                    "active": tuple(range(n)), "probe": False, "phase": "rows", "freezing": False,
                    "stem": None, "running": None, "sources": (), "fresh": (), "rates": (),
                    "lower": n - active, "rows": rows,
                }  # fmt: skip
                assert schedule.observe(state, plan, Reading(math.nan)) == state


def test_what_a_step_costs():
    """8 blocks, 4 on all rows, 4 on a quarter. Forward 8; backward 2 x 4; 2 x 4 / 4. Full: 24."""
    schedule = RowSuffix(active=4, rows=0.25)
    plan = schedule.plan(schedule.init(8), Progress(0, 250))
    upper = len(plan.active) - plan.lower
    assert 8 + 2 * upper + 2 * plan.rows * plan.lower == 18


@pytest.mark.parametrize("n", [8, 18])
def test_the_defaults_fit(n):
    schedule = RowSuffix()
    plan = schedule.plan(schedule.init(n), Progress(0, 250))
    assert (plan.lower, plan.rows) == (n - 4, 0.25)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"active": 0}, "active must be >= 1, got 0"),
        ({"active": 1.5}, "active must be a whole number"),
        ({"rows": 0.0}, "rows must be > 0 and <= 1, got 0.0"),
        ({"rows": 1.5}, "rows must be > 0 and <= 1, got 1.5"),
        ({"rows": math.nan}, "rows must be a finite number"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    with pytest.raises(ValueError, match=message):
        RowSuffix(**numbers)


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match=r"active must be 1\.\.3, got 4: lower it"):
        RowSuffix(active=4).init(3)
