"""The pool itself: a rank that fails, dies or hangs fails the test, and the next test runs."""

import os
import time

import pytest
import torch
from torch import distributed

from tests.distributed import pool


def total(_rank, number):
    value = torch.tensor([number], dtype=torch.float64)
    distributed.all_reduce(value)
    return value.item()


def fails(rank):
    if rank == 1:
        raise ValueError("on purpose")
    return total(rank, 1.0)


def dies(rank):
    if rank == 1:
        os._exit(3)
    return rank


def hangs(rank):
    time.sleep(100 * rank)


@pytest.mark.parametrize(
    ("wrong", "said"), [(fails, "on purpose"), (dies, "rank 1"), (hangs, "no answer")]
)
def test_a_bad_rank_fails_the_test(wrong, said, ranks, monkeypatch):
    assert ranks(total, 2.5) == [5.0, 5.0]
    monkeypatch.setattr(pool, "PATIENCE_S", 3.0)
    with pytest.raises(AssertionError, match=said):
        ranks(wrong)
