"""Draws: fixed for good, and uniform."""

import itertools
from collections import Counter

import pytest

from blocksched.schedules.draw import permutation, uniform

PERMUTED = {
    "5f7878a28261e03c": 0,
    "42422922fb5daf47": 1,
    "8f8b93f2fbbe7c01": 2,
    "d0540ee1b7fe323a": 3,
    "f067558900ecba2e": 4,
}  # how `printf "7 order 0" | sha256sum` and so on begin


def test_known_values():
    assert permutation(5, 7, "order") == tuple(i for _, i in sorted(PERMUTED.items()))
    # printf "7 step 3" | sha256sum; a float holds the first 53 of its bits.
    assert uniform(7, "step 3") == 0xB5D59F1B20507D69 // 2**11 / 2**53


def test_every_order_is_drawn_equally_often():
    """6 orders of 3 in 6000 draws: five degrees of freedom, chi2 > 20.5 once in 1000 tests."""
    drawn = Counter(permutation(3, seed, "x") for seed in range(6000))
    assert set(drawn) == set(itertools.permutations(range(3)))
    assert sum((count - 1000) ** 2 / 1000 for count in drawn.values()) < 20.5


def test_uniform_numbers_fill_the_interval():
    """As above, ten bins of 400."""
    drawn = [uniform(0, f"step {step}") for step in range(4000)]
    assert all(0 <= number < 1 for number in drawn)
    bins = Counter(int(10 * number) for number in drawn)
    assert sum((bins[i] - 400) ** 2 / 400 for i in range(10)) < 27.9


@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_a_permutation_has_each_number_once(n):
    assert sorted(permutation(n, 3, "x")) == list(range(n))


def test_seed_and_purpose_matter():
    draws = [permutation(20, 0, "a"), permutation(20, 1, "a"), permutation(20, 0, "b")]
    assert len(set(draws)) == 3
    assert len({uniform(0, "a"), uniform(1, "a"), uniform(0, "b")}) == 3
