"""Verdicts: what an interval allows to say, each with a sentence that has the numbers."""

import math
from typing import NamedTuple

from bench.trials.design import FEWEST, Study
from bench.trials.inference import Comparison, Interval

WIN, LOSS = "WIN", "LOSS"
FASTER_BUT_WORSE = "FASTER_BUT_WORSE"
NO_DIFFERENCE, INCONCLUSIVE = "NO_DIFFERENCE", "INCONCLUSIVE"


class Verdict(NamedTuple):
    """One of the five words, and why."""

    word: str
    why: str


def against_baseline(
    found: Comparison, margin: float, floor: Interval | None, reservation: str | None
) -> Verdict:
    """The verdict on an arm.

    Args:
        found: the arm against the baseline.
        margin: relative differences of the loss below this do not matter.
        floor: the loss of the null arm, whose interval an arm has to be clear of; None: of 0 alone.
        reservation: why nothing here can be a WIN, if it cannot.
    """
    early = _early(found, margin)
    if early is not None:
        return early
    least, most, noise = 0.0, 0.0, "0"
    if floor is not None and floor.low is not None:
        least, most = min(0.0, floor.low), max(0.0, floor.high)
        noise = f"0 and of what the null arm does ({_range(floor, '+.2%')})"
    change = _change(found.loss)
    if found.loss.high < least:
        better = f"{change}, clear of {noise}; {_time(found)}"
        if found.time.high is None or found.time.high >= 1:
            return Verdict(INCONCLUSIVE, f"{better}: not certainly earlier.")
        return _win(better, reservation)
    if found.loss.low > most:
        worse = f"{change}, clear of {noise}; a step takes {_share(found.step)} of the time"
        faster = found.step.high < 1
        return Verdict(FASTER_BUT_WORSE if faster else LOSS, f"{worse} of {found.rival}'s.")
    return Verdict(INCONCLUSIVE, f"{change}: neither within {margin:.2%} nor clear of {noise}.")


def against_rival(found: Comparison, margin: float, reservation: str | None) -> Verdict:
    """The verdict on an arm against another than the baseline, of their losses alone."""
    early = _early(found, margin)
    if early is not None:
        return early
    change = _change(found.loss)
    if found.loss.high < 0:
        return _win(f"{change}, clear of 0", reservation)
    if found.loss.low > 0:
        return Verdict(LOSS, f"{change}, clear of 0.")
    return Verdict(INCONCLUSIVE, f"{change}: neither within {margin:.2%} nor clear of 0.")


def reservation(study: Study, found: Comparison) -> str | None:
    """Why what was found cannot be a WIN, however good it is; None if it can."""
    if study.clock == "cost":
        return "better by computed cost; a WIN needs measured time"
    if not study.confirms:
        return f"better in the search; a WIN needs {FEWEST} fresh seeds"
    if found.runs < len(study.seeds):
        return f"better so far; a WIN needs all {len(study.seeds)} seeds of the study"
    if found.pairs < FEWEST:
        return f"better on {found.pairs} pairs; a WIN needs {FEWEST}"
    return None


def _early(found: Comparison, margin: float) -> Verdict | None:
    """What does not depend on the sign of a difference."""
    if found.failed:
        return Verdict(
            LOSS, f"It failed on {found.failed} of {found.runs} seeds where {found.rival} did not."
        )
    if found.loss is None or found.loss.low is None:
        return Verdict(INCONCLUSIVE, f"An interval needs 2 pairs of seeds, got {found.pairs}.")
    if -margin < found.loss.low and found.loss.high < margin:
        return Verdict(NO_DIFFERENCE, f"{_change(found.loss)}, within {margin:.2%} either way.")
    return None


def _win(better: str, reservation: str | None) -> Verdict:
    if reservation is None:
        return Verdict(WIN, f"{better}.")
    return Verdict(INCONCLUSIVE, f"{better}: {reservation}.")


def _change(loss: Interval) -> str:
    return f"At equal time its loss changes by {loss.center:+.2%} ({_range(loss, '+.2%')})"


def _time(found: Comparison) -> str:
    return f"the time to {found.rival}'s final loss, as a share of its own: {_share(found.time)}"


def _share(value: Interval) -> str:
    return f"{_number(value.center, '.0%')} ({_range(value, '.0%')})"


def _range(value: Interval, form: str) -> str:
    return f"{_number(value.low, form)} to {_number(value.high, form)}"


def _number(value: float | None, form: str) -> str:
    return "no bound" if value is None or math.isinf(value) else f"{value:{form}}"
