"""What it costs to decide together: `torchrun --nproc-per-node 2 bench/votes.py [ROUNDS]`.

A vote is held on every step, readings are gathered on a probe (and the clock, one number, on every
step of a run with a time budget). Beside them stands a bucket of gradients, 25 MiB, all-reduced.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import distributed

from blocksched.agreement import Ranks

_BLOCKS = 80


def main() -> None:
    """Time each in interleaved rounds and print the medians."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    ranks = Ranks.find()
    if ranks is None:
        sys.exit("a vote takes two: torchrun --nproc-per-node 2 bench/votes.py")
    bucket = torch.zeros(25 * 2**20 // 4)
    readings = [0.5] * (1 + 3 * _BLOCKS)
    calls = {
        "a vote": lambda: ranks.agree("step 7 does what all do"),
        f"readings of a probe, {_BLOCKS} blocks": lambda: ranks.gather(readings),
        "a bucket of gradients": lambda: distributed.all_reduce(bucket),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            distributed.barrier()
            start = time.perf_counter()
            call()
            took[name].append((time.perf_counter() - start) * 1e3)
    if ranks.rank == 0:
        print(f"{ranks.world} processes, gloo, medians of {rounds} rounds:")
        for name, ms in took.items():
            print(f"  {name:<32} {statistics.median(ms):8.3f} ms")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
