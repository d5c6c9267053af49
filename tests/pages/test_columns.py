"""Steps in columns: what a column says is what trained, however many steps it stands for."""

import itertools
import re
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pages import columns as module
from bench.pages.columns import columns, in_words, marks, ranges
from tests.pages.runs import run_of


@st.composite
def runs(draw):
    """Blocks, a set a step, probes, and how many columns there may be."""
    n = draw(st.integers(1, 6))
    pool = draw(st.lists(st.sets(st.integers(0, n - 1)), min_size=1, max_size=4))
    sets = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=50))
    probes = draw(st.sets(st.integers(0, len(sets) - 1)))
    return n, sets, sorted(probes), draw(st.integers(1, 60))


def numbers(words: str) -> list[int]:
    """0, 2-4 -> 0, 2, 3, 4."""
    found = []
    for one in re.findall(r"\d+(?:-\d+)?", words):
        low, _, high = one.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def columns_of(n, sets, probes, most):
    with mock.patch.object(module, "MOST", most):
        return columns(run_of(n, sets, probes).runs[0], n)


@settings(deadline=None)
@given(runs())
def test_a_column_says_what_its_steps_did(made):
    n, sets, probes, most = made
    found = columns_of(*made)
    assert len(found) <= most
    told = []
    for column in found:
        words = in_words(column, n)
        steps, trained, *probed = re.split(r": |; ", words)
        of_column = numbers(steps)
        told += of_column
        there = [sets[step] for step in of_column]
        sizes = sorted(len(one) for one in there)
        always = set.intersection(*there)
        some = set.union(*there) - always
        count, _, which = trained.partition(f" of {n} blocks train")
        low, high = sizes[0], sizes[-1]
        assert numbers(count.partition("(")[0]) == sorted({low, high})
        if low < high:
            assert f"(on average {sum(sizes) / len(sizes):.1f})" in count
        in_all, _, in_some = which.partition(" in every step") if some else (which, "", "")
        if some and not always:
            in_all, in_some = "", which
        assert set(numbers(in_all)) == always
        assert set(numbers(in_some)) == some
        inside = [step for step in probes if step in of_column]
        assert bool(probed) == bool(inside)
        if inside:
            assert probed[0].startswith(f"{len(inside)} probe")
    assert told == list(range(len(sets)))


@given(runs())
@settings(deadline=None)
def test_no_probe_is_lost(made):
    _, _, probes, _ = made
    found = columns_of(*made)
    assert list(itertools.chain(*(column.probes for column in found))) == probes
    for column in found:
        assert all(0 <= step - column.first < column.steps for step in column.probes)


def test_words():
    made = run_of(8, [range(8), *[range(3, 8)] * 3], probes=[0])
    (whole,) = columns_of(8, [range(8), *[range(3, 8)] * 3], [0], 1)
    assert in_words(whole, 8) == (
        "steps 0-3: 5 to 8 (on average 5.8) of 8 blocks train (3-7 in every step, 0-2 in some "
        "steps); 1 probe, step 0"
    )
    first, second, *_ = columns(made.runs[0], 8)
    assert in_words(first, 8) == "step 0: 8 of 8 blocks train (0-7); 1 probe, step 0"
    assert in_words(second, 8) == "step 1: 5 of 8 blocks train (3-7)"
    holes, nothing = columns(run_of(8, [{0, 2, 3, 7}, ()]).runs[0], 8)
    assert in_words(holes, 8) == "step 0: 4 of 8 blocks train (0, 2-3, 7)"
    assert in_words(nothing, 8) == "step 1: 0 of 8 blocks train"


def test_blocks_that_do_not_run_are_told():
    made = run_of(8, [{0, 1}] * 3 + [{0, 1, 2, 3}] * 3, running=[(0, {0, 1}), (3, range(4))])
    found = columns(made.runs[0], 8)
    assert [column.absent for column in found] == [(0, 0) + (1,) * 6] * 3 + [
        (0,) * 4 + (1,) * 4
    ] * 3
    assert in_words(found[0], 8) == "step 0: 2 of 8 blocks train (0-1), not running: 2-7"
    with mock.patch.object(module, "MOST", 1):
        (whole,) = columns(made.runs[0], 8)
    assert whole.absent == (0, 0, 3, 3, 6, 6, 6, 6)
    assert in_words(whole, 8).endswith(
        "(0-1 in every step, 2-3 in some steps), not running: 4-7, running in some steps: 2-3"
    )


def test_many_probes_of_a_column_are_counted():
    (column,) = columns_of(1, [{0}] * 30, [0, 1, 2, 5, 9], 1)
    assert in_words(column, 1).endswith("; 5 probes, steps 0-2, 5, 9")
    (column,) = columns_of(1, [{0}] * 30, range(0, 30, 3), 1)
    assert in_words(column, 1).endswith("; 10 probes, the first at step 0, the last at 27")


def test_ranges():
    assert ranges([0, 1, 3, 5, 6, 7]) == ["0-1", "3", "5-7"]
    assert ranges([]) == []


def test_what_is_not_known_from_the_first_step_is_not_told():
    made = run_of(2, [{0, 1}, {1}])
    for changes in ([], made.runs[0].changes[1:]):
        with mock.patch.dict(made.runs[0].__dict__, changes=changes):
            assert columns(made.runs[0], 2) == []
    assert columns(run_of(2, []).runs[0], 2) == []


def test_marks():
    events = [
        {"step": 3, "final_recovery_stage": "stage1"},
        {"step": 1, "freeze_trigger": {}},
        {"step": 5, "final_recovery_stage": "stage3_full"},
        {"step": 9, "final_recovery_stage": "beyond its end"},
    ]
    assert marks(run_of(2, [{1}] * 6, events=events).runs[0]) == [
        (1, "freezing begins"),
        (3, "recovery: stage 1"),
        (5, "recovery: all blocks"),
    ]
