"""`ranks(function, *arguments)`: runs a function of the test file on two processes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def _pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture
def ranks(_pool: Pool) -> Callable[..., list[Any]]:
    """Calls function(rank, *arguments) on both ranks; their results, rank 0's first."""
    return _pool.run
