"""Random numbers of pure functions: hashes of a seed and what is drawn.

Python promises the sequence of `random.random` for a seed, but not that of `shuffle` or `sample`;
a hash gives all ranks, versions and resumed runs the same.
"""

import hashlib


def permutation(n: int, seed: int, what: str) -> tuple[int, ...]:
    """0..n-1 in an order drawn uniformly, the same for the same `seed` and `what`."""
    return tuple(sorted(range(n), key=lambda i: _digest(seed, f"{what} {i}")))


def uniform(seed: int, what: str) -> float:
    """A number drawn uniformly from [0, 1), the same for the same `seed` and `what`."""
    return (int.from_bytes(_digest(seed, what)[:8]) >> 11) / 2**53  # all that a float holds


def _digest(seed: int, what: str) -> bytes:
    return hashlib.sha256(f"{seed} {what}".encode()).digest()
