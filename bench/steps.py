"""Three claims about step times, measured in interleaved rounds: `python bench/steps.py [ROUNDS]`.

1. A step takes what its parts take, measured apart: suffixes, active sets with holes, and stacks of
   which some blocks do not run. The anchors (bench/costs.py) over the sum of their own parts, other
   shapes over what the lines through the anchors say. On blocksched's kernels where they are.
2. A scheduler with nothing to decide costs nothing one notices: a loop with it over the bare loop.
3. Where a batch returns, PrefixCache makes a suffix step faster: full update over it, beside the
   rules of thumb, 3 / (3 - 2f) and with the cache 1 / (1 - f), of a share f of blocks frozen.

At preset `small` on a CPU, at the experiment's size on CUDA.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench.config import resolve, resolve_device
from bench.costs import Shape, anchors
from bench.expected import Expected
from bench.pages.columns import ranges
from bench.tasks.text import TextTask
from blocksched import BlockScheduler, FullUpdate, PrefixCache, StaticSuffix
from blocksched.ops import backend_of
from blocksched.schedules import Plan

_TURNS = 6  # timed steps with and without the scheduler in a round


def others(n: int) -> dict[Shape, Plan]:
    """Shapes that are no anchors, as lisa, cyclic, payoff and grow have them."""
    half, most = tuple(range(n // 2)), tuple(range(3 * n // 4))
    plans = [
        Plan((n // 2,), stem=True),
        Plan(tuple(range(1, n, 2)), stem=True),
        Plan(tuple(range(1, n, 2))),
        Plan((3 * n // 8,)),
        Plan((n // 4, n - 1)),
        Plan(half, running=half),
        Plan(most, running=most),
        Plan(half[len(half) // 2 :], running=half),
        Plan((1, n // 2), running=most),
    ]
    return {Shape.of(plan, n): plan for plan in plans if Shape.of(plan, n) not in anchors(n)}


def in_words(plan: Plan) -> str:
    """What a step trains, and which blocks run in it if not all."""
    trained = ", ".join(ranges(plan.active)) + (" and the stem" if plan.stem_trains else "")
    return trained if plan.running is None else f"{trained}; {', '.join(ranges(plan.running))} run"


class Loop:
    """A loop of full updates; the scheduler comes and goes, weights and memory stay the same."""

    def __init__(self, task: TextTask) -> None:
        self._task = task
        self._model = task.model(fused=False)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._inputs, self._targets = task.batch(0)
        self.calls_ms: list[float] = []  # of scheduler.step alone

    def steps_ms(self, attached: bool) -> list[float]:
        """The times of a few steps, with a scheduler attached or without."""
        scheduler = None
        if attached:
            scheduler = BlockScheduler(
                self._model, self._optimizer, FullUpdate(), total_steps=1 << 40
            )
        times = [self._step_ms(scheduler) for _ in range(_TURNS + 1)]
        if scheduler is not None:
            scheduler.close()
        return times[1:]  # the first is watched: a boundary was set

    def _step_ms(self, scheduler: BlockScheduler | None) -> float:
        start = time.perf_counter()
        loss = self._task.loss(self._task.forward(self._model, self._inputs), self._targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if scheduler is not None:
            called = time.perf_counter()
            scheduler.step(loss)
            self.calls_ms.append((time.perf_counter() - called) * 1e3)
        loss.item()
        return (time.perf_counter() - start) * 1e3


class Suffix(Loop):
    """A loop of one batch in which the top `k` blocks train."""

    def __init__(self, task: TextTask, k: int, cache: PrefixCache | None = None) -> None:
        super().__init__(task)
        self.scheduler = BlockScheduler(
            self._model, self._optimizer, StaticSuffix(active=k), total_steps=1 << 40, cache=cache
        )

    def step_ms(self) -> float:
        """The median of a few steps, the first left out."""
        return statistics.median([self._step_ms(self.scheduler) for _ in range(_TURNS + 1)][1:])


def cached(task: TextTask, n_blocks: int, rounds: int) -> None:
    """Measure and print the third claim."""
    ks = [k for k in (n_blocks // 4, n_blocks // 2, 3 * n_blocks // 4) if k > 0]
    full = Suffix(task, n_blocks)
    caches = {k: PrefixCache(1 << 32) for k in ks}
    loops = {k: (Suffix(task, k), Suffix(task, k, caches[k])) for k in ks}
    gains: dict[int, list[tuple[float, float]]] = {k: [] for k in ks}
    for _ in range(rounds):
        whole = full.step_ms()
        for k, (plain, kept) in loops.items():
            gains[k].append((whole / plain.step_ms(), whole / kept.step_ms()))
    for k, pairs in gains.items():
        plain, kept = (statistics.median(each) for each in zip(*pairs, strict=True))
        f = 1 - k / n_blocks
        print(
            f"k={k:<2} full update / suffix step        {plain:.2f} (rule {3 / (3 - 2 * f):.2f}), "
            f"with PrefixCache {kept:.2f} (rule {1 / (1 - f):.2f})"
        )
        if caches[k].off is not None:
            print(f"     PrefixCache turned itself off: {caches[k].off}")


def main(rounds: int) -> None:
    """Measure and print the claims."""
    config = resolve({})
    task = TextTask(config, resolve_device(config.device))
    n = config.n_layers
    fused = backend_of("mlp", task.device.type) != "eager"
    beside = others(n)
    expected = Expected(task, config, fused, beside=list(beside.values()))
    loop = Loop(task)
    over, bare = [], []
    for turn in range(rounds):
        expected.round()
        order = (False, True) if turn % 2 else (True, False)
        times = {attached: statistics.median(loop.steps_ms(attached)) for attached in order}
        over.append(times[True] / times[False])
        bare.append(times[False])
    print(f"{task.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{config.n_layers} blocks of width {config.dmodel}, {rounds} rounds, medians")
    print(f"whole step over what is expected ({'fused' if fused else 'eager'}), by what trains:")
    for shape, ratio in expected.measured_over_expected().items():
        where = "its parts" if shape not in beside else "the lines"
        print(f"  {in_words((beside | anchors(n))[shape]):30} over {where}  {ratio:.3f}")
    spread = statistics.quantiles(over, n=4)
    print(
        f"scheduler attached / bare loop     {statistics.median(over):.4f} "
        f"(middle half of the rounds {spread[0]:.3f} to {spread[2]:.3f})"
    )
    call, step = statistics.median(loop.calls_ms), statistics.median(bare)
    print(f"scheduler.step alone               {call * 1e3:.0f} us, {call / step:.3%} of a step")
    cached(task, config.n_layers, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
