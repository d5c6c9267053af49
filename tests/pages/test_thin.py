"""Thinned points are real ones, and none that matters is missing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pages.thin import buckets, extremes

VALUE = st.none() | st.floats(-1e9, 1e9)
VALUES = st.integers(1, 200).flatmap(lambda n: st.lists(VALUE, min_size=n, max_size=n))


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 500), st.integers(1, 60))
def test_buckets_cover_every_place_once(count, most):
    found = buckets(count, most)
    assert [i for bucket in found for i in bucket] == list(range(count))
    assert len(found) == min(count, most)
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


@settings(deadline=None, derandomize=True)
@given(VALUES, st.integers(5, 60))
def test_extremes(values, most):
    kept = extremes(values, most)
    assert kept == sorted(set(kept))
    assert len(kept) <= most
    assert {0, len(values) - 1} <= set(kept)
    left = [values[i] for i in kept]
    assert (None in values) == (None in left)
    known = [v for v in values if v is not None]
    assert not known or {min(known), max(known)} <= set(left)


def test_nothing_stays_nothing():
    assert extremes([], 5) == []


def test_short_runs_are_whole():
    assert extremes([3.0, None, 1.0, 2.0, 5.0], 5) == [0, 1, 2, 3, 4]


def test_each_bucket_keeps_its_peak_its_dip_and_its_gap():
    values: list[float | None] = [0.0] * 3000
    for i in range(50, 3000, 100):
        values[i - 20], values[i], values[i + 20] = 1.0, None, -1.0
    kept = set(extremes(values, 152))  # 50 buckets of 60 steps
    for i in range(50, 3000, 100):
        assert {i - 20, i, i + 20} <= kept
