"""Verdicts: each rule, their order, and what they say of studies whose truth is known."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trials import judge
from bench.trials.inference import Comparison, Interval, relative_change
from bench.trials.judge import FASTER_BUT_WORSE, INCONCLUSIVE, LOSS, NO_DIFFERENCE, WIN
from tests.trials.made import study

EARLIER, LATER = (0.7, 0.6, 0.8), (1.2, 1.1, 1.3)
SHORTER, LONGER = (0.5, 0.4, 0.6), (1.0, 0.9, 1.1)
BETTER, WORSE = (-0.05, -0.07, -0.03), (0.05, 0.03, 0.07)
MARGIN = 0.01


def found(loss, time=EARLIER, step=LONGER, *, failed=0, runs=10, pairs=10) -> Comparison:
    loss, time, step = (x and Interval(*x) for x in (loss, time, step))
    return Comparison(
        rival="base", runs=runs, pairs=pairs, failed=failed, loss=loss, time=time, step=step
    )


def word(comparison: Comparison, floor=(0.0, -0.01, 0.01), reservation: str | None = None) -> str:
    floor = floor and Interval(*floor)
    return judge.against_baseline(comparison, MARGIN, floor, reservation).word


def test_what_failed_alone_has_lost_however_good_the_rest_is():
    assert word(found(BETTER, failed=1)) == LOSS
    assert word(found((0.0, -0.001, 0.001), failed=1)) == LOSS
    assert word(found(None, None, None, failed=1, pairs=0)) == LOSS


def test_fewer_than_two_pairs_say_nothing():
    assert word(found(None, None, None, pairs=0)) == INCONCLUSIVE
    one = found((-0.2, None, None), (0.5, None, None), (0.5, None, None), pairs=1)
    assert word(one) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.009, 0.009, NO_DIFFERENCE), (-0.009, -0.001, NO_DIFFERENCE), (0.001, 0.009, NO_DIFFERENCE),
     (-0.011, -0.001, WIN), (-0.011, 0.009, INCONCLUSIVE), (-0.009, 0.011, INCONCLUSIVE),
     (0.001, 0.011, LOSS), (-0.01, 0.0, INCONCLUSIVE), (0.0, 0.01, INCONCLUSIVE)],
)  # fmt: skip
def test_inside_the_margin_is_no_difference_even_clear_of_0(low, high, expected):
    assert word(found(((low + high) / 2, low, high)), floor=None) == expected


def test_a_win_is_clear_of_0_and_of_the_null_and_earlier():
    assert word(found(BETTER)) == WIN
    assert word(found(BETTER), floor=None) == WIN
    assert word(found(BETTER), floor=(0.0, -0.03, 0.03)) == INCONCLUSIVE
    assert word(found(BETTER), floor=(0.0, -0.0299, 0.03)) == WIN
    assert word(found((-0.05, -0.1, 0.0)), floor=(0.02, 0.01, 0.03)) == INCONCLUSIVE
    for time in ((0.9, 0.8, 1.0), LATER, (0.7, None, None), (0.7, 0.6, math.inf)):
        assert word(found(BETTER, time)) == INCONCLUSIVE


def test_a_null_without_bounds_leaves_0():
    assert word(found(BETTER), floor=(-0.5, None, None)) == WIN


def test_what_is_worse_has_lost_unless_its_steps_are_faster():
    assert word(found(WORSE)) == LOSS
    assert word(found(WORSE, step=SHORTER)) == FASTER_BUT_WORSE
    assert word(found(WORSE, step=(0.9, 0.8, 1.0))) == LOSS
    for step in (SHORTER, LONGER):
        assert word(found(WORSE, step=step), floor=(0.0, -0.03, 0.03)) == INCONCLUSIVE
        assert word(found((0.05, 0.0, 0.1), step=step), floor=None) == INCONCLUSIVE


def test_a_reservation_keeps_back_a_win_and_nothing_else():
    kept = judge.against_baseline(found(BETTER), MARGIN, None, "a search")
    assert kept.word == INCONCLUSIVE
    assert kept.why.endswith(": a search.")
    for loss, expected in ((WORSE, LOSS), ((0.0, -0.001, 0.001), NO_DIFFERENCE)):
        assert word(found(loss), reservation="a search") == expected


def test_against_a_rival_the_losses_alone_count():
    def rival(comparison, reservation=None):
        return judge.against_rival(comparison, MARGIN, reservation).word

    for time, step in ((EARLIER, SHORTER), (LATER, LONGER)):
        assert rival(found(BETTER, time, step)) == WIN
        assert rival(found(BETTER, time, step), "a search") == INCONCLUSIVE
        assert rival(found(WORSE, time, step)) == LOSS
    assert rival(found((0.0, -0.001, 0.001))) == NO_DIFFERENCE
    assert rival(found((0.0, -0.1, 0.1))) == INCONCLUSIVE
    assert rival(found((-0.05, -0.1, 0.0))) == rival(found((0.05, 0.0, 0.1))) == INCONCLUSIVE
    assert rival(found(BETTER, failed=1)) == LOSS
    assert rival(found(None, None, None, pairs=0)) == INCONCLUSIVE


def test_a_win_needs_measured_time_a_confirmation_and_all_of_its_seeds(tmp_path):
    asked = study(tmp_path, range(11, 22))
    assert judge.reservation(asked, found(BETTER, runs=11, pairs=11)) is None
    assert judge.reservation(asked, found(BETTER, runs=11, pairs=10)) is None
    few = judge.reservation(asked, found(BETTER, runs=11, pairs=9))
    assert few == "better on 9 pairs; a WIN needs 10"
    early = judge.reservation(asked, found(BETTER, runs=10, pairs=10))
    assert early == "better so far; a WIN needs all 11 seeds of the study"
    search = judge.reservation(dataclasses.replace(asked, confirms=()), found(BETTER, runs=11))
    assert search == "better in the search; a WIN needs 10 fresh seeds"
    computed = judge.reservation(dataclasses.replace(asked, clock="cost"), found(BETTER, runs=11))
    assert computed == "better by computed cost; a WIN needs measured time"


def test_the_reasons_have_the_numbers():
    null, whole = Interval(0.001, -0.002, 0.004), found(BETTER, (0.7, 0.6, 0.84))
    assert judge.against_baseline(whole, MARGIN, null, None).why == (
        "At equal time its loss changes by -5.00% (-7.00% to -3.00%), clear of 0 and of what the "
        "null arm does (-0.20% to +0.40%); the time to base's final loss, as a share of its own: "
        "70% (60% to 84%)."
    )
    never = found(BETTER, (math.inf, 0.9, math.inf))
    said = judge.against_baseline(never, MARGIN, null, None).why
    assert said.endswith("no bound (90% to no bound): not certainly earlier.")
    worse = judge.against_baseline(found(WORSE, step=SHORTER), MARGIN, None, None).why
    assert worse.endswith("clear of 0; a step takes 50% (40% to 60%) of the time of base's.")
    failed = judge.against_baseline(found(BETTER, failed=2), MARGIN, None, None).why
    assert failed == "It failed on 2 of 10 seeds where base did not."


_BOUNDS = st.tuples(*[st.floats(-0.5, 0.5)] * 3).map(sorted)


@settings(deadline=None)
@given(_BOUNDS, _BOUNDS, st.sampled_from([SHORTER, LONGER]))
def test_of_two_arms_the_better_one_wins_what_the_other_loses(loss, floor, step):
    def turned(x):
        return [-x[1], -x[2], -x[0]]

    def centered(x):
        return [x[1], x[0], x[2]]

    forth = word(found(centered(loss), step=step), centered(floor))
    back = word(found(turned(loss), step=step), turned(floor))
    worse = FASTER_BUT_WORSE if step == SHORTER else LOSS
    assert back == {WIN: worse, worse: WIN}.get(forth, forth)


def drawn(n: int, change: float, noise: float, level: float, source: random.Random) -> Comparison:
    """A study's arm whose steps are faster: its true change, and the noise of each run."""
    logs = [math.log1p(change) + source.gauss(0, noise) - source.gauss(0, noise) for _ in range(n)]
    return found(relative_change([math.exp(x) for x in logs], level), step=SHORTER)


def share(wanted: str, change: float, noise: float, *, n=10, level=0.95, draws=500) -> float:
    """How often the verdict is `wanted`, with a null arm of the same noise."""
    source = random.Random(1)
    words = []
    for _ in range(draws):
        floor = drawn(n, 0.0, noise, level, source).loss
        words.append(word(drawn(n, change, noise, level, source), floor))
    return words.count(wanted) / draws


def test_the_verdict_can_tell():
    assert share(NO_DIFFERENCE, 0.0, 0.003, draws=200) > 0.99
    assert share(WIN, -0.04, 0.003, draws=200) > 0.99
    assert share(FASTER_BUT_WORSE, 0.04, 0.003, draws=200) > 0.99
    assert share(INCONCLUSIVE, 0.0, 0.05, draws=200) > 0.95


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_arms_that_are_the_baseline_seldom_win(level):
    noise = 0.05  # so large that the margin keeps nothing back
    source = random.Random(2)
    alone = [word(drawn(10, 0.0, noise, level, source), None) for _ in range(1000)]
    one_side = (1 - level) / 2
    error = 3.5 * math.sqrt(one_side * (1 - one_side) / 1000)
    assert alone.count(WIN) / 1000 == pytest.approx(one_side, abs=error)
    assert share(WIN, 0.0, noise, level=level) < one_side
