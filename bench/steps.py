"""Two claims about step times, measured in interleaved rounds: `python bench/steps.py [ROUNDS]`.

1. A suffix step takes what its parts take: whole steps over the sum of the parts measured apart.
2. A scheduler with nothing to decide costs nothing one notices: a loop with it over the bare loop.

At preset `small` on a CPU, at the experiment's size on CUDA.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench.config import resolve, resolve_device
from bench.expected import Expected
from bench.tasks.text import TextTask
from blocksched import BlockScheduler, FullUpdate

_TURNS = 4  # steps of each loop in a round


class Loop:
    """A training loop of full updates, with or without a scheduler."""

    def __init__(self, task: TextTask, attached: bool) -> None:
        self._task = task
        self._model = task.model()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._scheduler = None
        if attached:
            self._scheduler = BlockScheduler(
                self._model, self._optimizer, FullUpdate(), total_steps=1 << 40
            )
        self._inputs, self._targets = task.batch(0)

    def step_ms(self) -> float:
        """The time of one step."""
        start = time.perf_counter()
        loss = self._task.loss(self._task.forward(self._model, self._inputs), self._targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step(loss)
        loss.item()
        return (time.perf_counter() - start) * 1e3


def main(rounds: int) -> None:
    """Measure and print both claims."""
    config = resolve({})
    task = TextTask(config, resolve_device(config.device))
    expected = Expected(task, config)
    loops = {"bare": Loop(task, attached=False), "attached": Loop(task, attached=True)}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds):
        expected.round()
        order = list(loops) if turn % 2 else list(loops)[::-1]
        for name in order:
            loops[name].step_ms()  # the other loop has cooled the cache
            times[name].append(statistics.median(loops[name].step_ms() for _ in range(_TURNS)))
    print(f"{task.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{config.n_layers} blocks of width {config.dmodel}, {rounds} rounds, medians")
    for k, over in expected.efficiency().items():
        print(f"k={k:<2} whole step / sum of its parts  {over:.3f}")
    pairs = zip(times["attached"], times["bare"], strict=True)
    print(f"scheduler attached / bare loop     {statistics.median(a / b for a, b in pairs):.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
