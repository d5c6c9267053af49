"""Intervals against published numbers, against counting, and over many draws."""

import builtins
import math
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.config import UserError
from bench.trials.inference import Interval, compare, corrected, median, relative_change
from tests.trials.made import by_seed, cell

INF = math.inf
# Hours of sleep gained by the second drug over the first: Student, "The Probable Error of a Mean",
# Biometrika 6 (1908); R's documentation of t.test prints their interval.
SLEEP = (1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4)


def ratios(logs) -> list[float]:
    return [math.exp(x) for x in logs]


def logs(interval: Interval) -> list[float]:
    return [math.log1p(x) for x in interval]


def test_student_s_own_interval():
    found = logs(relative_change(ratios(SLEEP), 0.95))
    assert found == pytest.approx([1.58, 0.7001142, 2.4598858], abs=1e-6)


@pytest.mark.parametrize(
    ("n", "level", "t"),
    [(2, 0.95, 12.706), (3, 0.95, 4.303), (5, 0.95, 2.776), (10, 0.95, 2.262), (10, 0.99, 3.250),
     (10, 0.998, 4.297), (31, 0.95, 2.042)],
)  # fmt: skip
def test_half_the_width_is_that_of_the_published_table(n, level, t):
    values = [0.01 * (-1) ** i for i in range(n)]
    _, low, high = logs(relative_change(ratios(values), level))
    assert (high - low) / 2 == pytest.approx(t * np.std(values, ddof=1) / math.sqrt(n), rel=2e-4)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda x: np.std(x) > 1e-3),
    st.floats(0.5, 0.999),
)
def test_it_is_scipy_s_interval(values, level):
    wanted = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    _, low, high = relative_change(ratios(values), level)
    assert (low, high) == pytest.approx(tuple(np.expm1(wanted)), rel=1e-6, abs=1e-9)


def test_differences_that_are_all_the_same_have_an_interval_without_width():
    assert relative_change([1.0] * 10, 0.95) == (0.0, 0.0, 0.0)
    center, low, high = relative_change([0.9] * 10, 0.95)
    assert low == center == high == pytest.approx(-0.1)


def test_one_ratio_has_no_bounds_and_none_is_nothing():
    assert relative_change([1.5], 0.95) == (pytest.approx(0.5), None, None)
    assert relative_change([], 0.95) is None
    assert median([0.5], 0.95) == (0.5, None, None)
    assert median([], 0.95) is None


def test_a_bound_beyond_all_floats_is_infinite():
    center, low, high = relative_change([1.0, 1e300], 0.99)
    assert (center, low, high) == (pytest.approx(1e150), -1.0, INF)


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (10, 0.95), (10, 0.99)])
def test_the_t_interval_holds_the_true_change_as_often_as_it_says(n, level):
    draws, drawn, true = 2000, random.Random(n), -0.03
    held = 0
    for _ in range(draws):
        logs = [math.log1p(true) + drawn.gauss(0, 0.01) for _ in range(n)]
        _, low, high = relative_change(ratios(logs), level)
        held += low <= true <= high
    # Three and a half standard errors of a share of so many draws.
    assert held / draws == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / draws))


def coverage(first: int, last: int, n: int) -> float:
    """How surely the median lies between two order statistics, the first being 1."""
    return sum(math.comb(n, k) for k in range(first, last)) / 2**n


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.995])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 8, 9, 10, 11, 20, 25])
def test_the_median_lies_between_the_innermost_order_statistics_that_hold_it(n, level):
    values = [100 + i for i in range(1, n + 1)]
    random.Random(0).shuffle(values)
    center, low, high = median(values, level)
    assert center == np.median(values)
    sure = [k for k in range(1, n // 2 + 1) if coverage(k, n + 1 - k, n) >= level]
    wanted = (100 + sure[-1], 101 + n - sure[-1]) if sure else (None, None)
    assert (low, high) == wanted


def test_what_is_never_reached_is_larger_than_all_else():
    shares = [0.7, 0.8, 0.9, 0.6, 0.65, 0.75, 0.85, 0.95, 0.55]
    assert median([*shares, INF], 0.95) == (pytest.approx(0.775), 0.6, 0.95)
    assert median([*shares, INF], 0.99) == (pytest.approx(0.775), 0.55, INF)
    assert median([*shares[:4], *[INF] * 6], 0.95) == (INF, 0.7, INF)
    assert median([INF] * 10, 0.95) == (INF, INF, INF)


def test_the_median_s_interval_holds_it_at_least_as_often_as_it_says():
    draws, drawn, held = 500, random.Random(3), 0
    for _ in range(draws):
        values = [drawn.expovariate(1.0) for _ in range(10)]
        _, low, high = median([x if x < 2 else INF for x in values], 0.95)
        held += low <= math.log(2) <= high
    exact = coverage(2, 9, 10)
    assert held / draws == pytest.approx(exact, abs=3.5 * math.sqrt(exact * (1 - exact) / draws))


def test_the_level_is_corrected_for_the_comparisons():
    assert corrected(0.95, 5) == pytest.approx(0.99)
    assert corrected(0.95, 1) == corrected(0.95, 0) == pytest.approx(0.95)


def test_pairs_are_made_by_seed():
    theirs = {1: cell(1, 2.0), 2: cell(2, 4.0), 3: cell(3, None), 4: cell(4, 3.0), 5: cell(5, 1.0)}
    ours = {5: cell(5, None), 4: cell(4, 3.3), 3: cell(3, 1.0), 2: cell(2, 4.4), 1: cell(1, 2.2)}
    found = compare("base", ours | {9: cell(9, 1.0)}, theirs, 0.95)
    assert (found.rival, found.runs, found.pairs, found.failed) == ("base", 5, 3, 1)
    assert found.loss == pytest.approx((0.1, 0.1, 0.1))


def test_time_is_to_the_loss_of_the_same_seed_and_on_its_clock():
    theirs = by_seed([3.0, 3.5, 2.5])
    for each in theirs.values():
        each["elapsed_ms"] = 1250.0
    # From 4.0 after 500 ms to 3.0 after 1000: at 3.5 after 750, never at 2.5.
    found = compare("base", by_seed([3.0, 3.0, 3.0]), theirs, 0.95)
    assert found.time == (pytest.approx(0.8), None, None)
    alone = [compare("base", by_seed([3.0]), {11: theirs[seed] | {"seed": 11}}, 0.95).time.center
             for seed in theirs]  # fmt: skip
    assert alone == pytest.approx([0.8, 0.6, INF])


def test_steps_are_compared_as_ratios():
    found = compare("base", by_seed([3.0] * 4, step_ms=6.0), by_seed([3.0] * 4), 0.95)
    assert found.step == pytest.approx((0.6, 0.6, 0.6))
    alone = compare("base", by_seed([3.0], step_ms=6.0), by_seed([3.0]), 0.95)
    assert alone.step == (pytest.approx(0.6), None, None)


@settings(deadline=None)
@given(st.permutations(range(11, 17)), st.floats(0.1, 10))
def test_neither_the_order_of_seeds_nor_the_unit_of_the_loss_matters(order, unit):
    ours, theirs = by_seed([3.1, 2.9, 3.3, 3.0, 2.8, 3.2]), by_seed([3.0, 3.1, 2.9, 3.2, 3.0, 2.7])
    scaled = []
    for cells, seeds in ((ours, order), (theirs, sorted(order))):
        scaled.append({seed: cells[seed] | {
            "final_val_loss": unit * cells[seed]["final_val_loss"],
            "val_trace": [p | {"val_loss": unit * p["val_loss"]} for p in cells[seed]["val_trace"]],
        } for seed in seeds})  # fmt: skip
    found, again = compare("base", ours, theirs, 0.95), compare("base", *scaled, 0.95)
    assert again.loss == pytest.approx(found.loss, abs=1e-9)
    assert again.time == pytest.approx(found.time, abs=1e-9)


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"must be above 0, got 0\.0: take a task"):
        compare("base", by_seed([0.0]), by_seed([1.0]), 0.95)


def test_without_scipy_it_says_what_to_install(monkeypatch):
    genuine = builtins.__import__

    def missing(name, *rest):
        if name == "scipy":
            raise ImportError(name)
        return genuine(name, *rest)

    for name in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install -e '\.\[bench\]'"):
        relative_change([1.0, 1.1], 0.95)
