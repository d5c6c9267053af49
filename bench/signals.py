"""Which signal tells blocks apart? `python bench/signals.py [--task finetune] [--json-out FILE]`.

At some moments of a run of full updates, on copies of model and optimizer, two truths per block:

- alone: how much a few steps of this block and the head lower the validation loss, beyond the head;
- missed: how much less all blocks but this one lower it than all do.

Against them what one probe can say, without training: rank correlations over the blocks. The truths
are taken twice, on other batches, and what they say of each other bounds what a signal can reach.

At preset `small`; the truths are of so many steps, at the learning rate of the moment.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from bench.config import Config, resolve
from bench.models import model_of, optimizer
from bench.results import write_whole
from bench.tasks.finetune import FinetuneTask
from bench.tasks.parts import Stack, Task
from bench.tasks.text import TextTask

MOMENTS = 0.05, 0.2, 0.5, 0.8  # of the run
PROBES = 4  # readings of each signal at a moment, each of two batches
_APART = 1 << 20  # batches that the run does not reach
_NUMBER = "the block's number"  # what a suffix, without looking, goes by
_BETAS, _EPS = (0.9, 0.999), 1e-8  # AdamW's
Run = tuple[Stack, torch.optim.Optimizer]
Values = list[float]  # one a block


def moments(task: Task, config: Config) -> Iterator[tuple[int, Run]]:
    """A run of full updates, stopped at each of the moments."""
    model = model_of(task, config, fused=False)
    made = optimizer(model, config, fused=False)
    for begin, end in itertools.pairwise([0, *(round(share * config.steps) for share in MOMENTS)]):
        for step in range(begin, end):
            _step(task, config, (model, made), step, step)
        yield end, (model, made)


def truths(
    task: Task, config: Config, run: Run, step: int, first: int, steps: int
) -> dict[str, Values]:
    """What `steps` steps buy on the batches from `first`, of each block and of the top 1, 2 .."""
    n = config.n_layers

    def end(active: Sequence[int]) -> float:
        model, made = copy.deepcopy(run)
        for i, block in enumerate(model.blocks):
            block.requires_grad_(i in active)
        model.stem.requires_grad_(0 in active)
        for batch in range(first, first + steps):
            _step(task, config, (model, made), step, batch)
        return _validate(task, model)

    head, suffix = end(()), [end(range(n - k, n)) for k in range(1, n + 1)]
    missed = [end([i for i in range(n) if i != b]) - suffix[-1] for b in range(n)]
    alone = [head - end((b,)) for b in range(n - 1)]
    return {
        "alone": [*alone, head - suffix[0]],
        "missed": missed,
        "suffix": [head - loss for loss in suffix],
    }


def signals(task: Task, run: Run, first: int) -> dict[str, Values]:
    """What one probe of two batches says of each block; a signal of one batch takes the first."""
    model, made = run
    one, two = (_gradients(task, model, first + i) for i in (0, 1))
    rows = [
        [_sums(p, g, h, made.state[p]) for p, g, h in zip(block.parameters(), gs, hs, strict=True)]
        for block, gs, hs in zip(model.blocks, one, two, strict=True)
    ]
    sums = [{key: sum(row[key] for row in block) for key in block[0]} for block in rows]
    found = {name: [rule(block) for block in sums] for name, rule in _SIGNALS.items()}
    return found | {_NUMBER: [float(i) for i in range(len(sums))]}


_SIGNALS: dict[str, Callable[[dict[str, float]], float]] = {
    "grad_ratio |g|/|p|": lambda s: (s["gg"] / s["pp"]) ** 0.5,
    "saliency sum |g p|": lambda s: s["gp"],
    "grad_norm |g|": lambda s: s["gg"] ** 0.5,
    "sum |g|": lambda s: s["g"],
    "descent g m / sqrt v": lambda s: s["gm_v"],
    "own descent g g / sqrt v": lambda s: s["gg_v"],
    "moments m m / sqrt v": lambda s: s["mm_v"],
    "two batches g1 g2 / sqrt v": lambda s: s["gh_v"],
    "two batches g1 g2": lambda s: s["gh"],
    "agreement cos(g1, g2)": lambda s: s["gh"] / (s["gg"] * s["hh"]) ** 0.5,
    "agreement cos(g, m)": lambda s: s["gm"] / (s["gg"] * s["mm"]) ** 0.5,
    "signs sum g sign(m)": lambda s: s["g_sign"],
    "descent per sum |g|": lambda s: s["g_sign"] / s["g"],
}


def _sums(p: Tensor, g: Tensor, h: Tensor, state: dict[str, Tensor]) -> dict[str, float]:
    """Of one parameter: its gradients in two batches, the moments from before."""
    p = p.detach()
    t = float(state["step"])
    m = state["exp_avg"] / (1 - _BETAS[0] ** t)
    root = (state["exp_avg_sq"] / (1 - _BETAS[1] ** t)).sqrt() + _EPS
    parts = {"pp": p * p, "gp": (g * p).abs(), "g": g.abs(), "gg": g * g, "hh": h * h, "gh": g * h,
             "mm": m * m, "gm": g * m, "gm_v": g * m / root, "gg_v": g * g / root,
             "mm_v": m * m / root, "gh_v": g * h / root, "g_sign": g * m.sign()}  # fmt: skip
    return {name: float(part.sum(dtype=torch.float64)) for name, part in parts.items()}


def _gradients(task: Task, model: Stack, batch: int) -> list[tuple[Tensor, ...]]:
    inputs, targets = task.batch(batch)
    loss = task.loss(task.forward(model, inputs), targets)
    blocks = [list(block.parameters()) for block in model.blocks]
    flat = iter(torch.autograd.grad(loss, [p for block in blocks for p in block]))
    return [tuple(itertools.islice(flat, len(block))) for block in blocks]


def _step(task: Task, config: Config, run: Run, step: int, batch: int) -> None:
    model, made = run
    for group in made.param_groups:
        group["lr"] = config.lr * (1 - step / config.steps)
    inputs, targets = task.batch(batch)
    task.loss(task.forward(model, inputs), targets).backward()
    made.step()
    made.zero_grad()


def _validate(task: Task, model: nn.Module) -> float:
    with torch.no_grad():
        return statistics.fmean(
            float(task.loss(task.forward(model, inputs), targets))
            for inputs, targets in task.validation()
        )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where both order the blocks alike, -1 where against each other."""
    ranks = [[sum(x < y for x in values) for y in values] for values in (a, b)]
    return statistics.correlation(*ranks) if all(len(set(r)) > 1 for r in ranks) else 0.0


def measure(task: Task, config: Config, steps: int) -> list[dict[str, Any]]:
    """At each moment its step, the truths, taken twice, and the readings of all signals."""
    found = []
    for step, run in moments(task, config):
        firsts = step, _APART + step
        probes = range(2 * _APART, 2 * _APART + 2 * PROBES, 2)
        found.append(
            {
                "step": step,
                "truths": [truths(task, config, run, step, first, steps) for first in firsts],
                "signals": [signals(task, run, first) for first in probes],
            }
        )
        for kind, values in _mean_truths(found[-1]).items():
            print(f"step {step:>4}  {kind:6}  {' '.join(f'{v:7.4f}' for v in values)}", flush=True)
    return found


def _mean_truths(moment: dict[str, Any]) -> dict[str, Values]:
    one, two = moment["truths"]
    return {kind: [(a + b) / 2 for a, b in zip(one[kind], two[kind], strict=True)] for kind in one}


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Of each signal: spread over the blocks, stability from probe to probe, rank correlation with
    the truths, then with `alone` at each moment."""
    form = "{:28} {:>7} {:>7} {:>7} {:>7}  {}".format
    lines = [form("", "max/min", "stable", "alone", "missed", "alone, at each moment")]
    for kind in ("alone", "missed"):
        own = [rank_correlation(*(truth[kind] for truth in at["truths"])) for at in found]
        spread = statistics.median(_spread(_mean_truths(at)[kind]) for at in found)
        lines.append(form(f"the truth {kind}", f"{spread:.2f}", f"{_mean(own):.2f}", "", "", ""))
    for name in (*_SIGNALS, _NUMBER):
        readings = [[probe[name] for probe in at["signals"]] for at in found]
        spread = statistics.median(_spread(reading) for probes in readings for reading in probes)
        pairs = [pair for probes in readings for pair in itertools.combinations(probes, 2)]
        columns = {
            kind: [
                _mean([rank_correlation(reading, _mean_truths(at)[kind]) for reading in probes])
                for at, probes in zip(found, readings, strict=True)
            ]
            for kind in ("alone", "missed")
        }
        numbers = [
            _mean([rank_correlation(*pair) for pair in pairs]),
            *map(_mean, columns.values()),
        ]
        each = " ".join(f"{value:5.2f}" for value in columns["alone"])
        lines.append(form(name, f"{spread:.2f}", *(f"{value:.2f}" for value in numbers), each))
    return lines


def _spread(values: Values) -> float:
    """The largest over the smallest; infinite where one is not above 0."""
    return max(values) / min(values) if min(values) > 0 else math.inf


_mean = statistics.fmean


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", default="text", choices=("text", "finetune"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--truth-steps", type=int, default=8, metavar="N", help="steps of each truth"
    )
    parser.add_argument("--json-out", metavar="FILE", help="also write all readings there")
    flags = parser.parse_args(given)
    config = resolve(
        {
            "preset": "small",
            "device": "cpu",
            "task": flags.task,
            "seed": flags.seed,
            "val_batches": 6,
        }
    )
    task = (TextTask if flags.task == "text" else FinetuneTask)(config, torch.device("cpu"))
    found = measure(task, config, flags.truth_steps)
    print(*table(found), sep="\n")
    if flags.json_out:
        write_whole(Path(flags.json_out), json.dumps(found).encode())


if __name__ == "__main__":
    main()
