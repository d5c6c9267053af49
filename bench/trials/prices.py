"""The deterministic clock of a study: what a step costs, computed from parts measured once.

A step's price is the sum of its parts' (bench/costs.py) for the blocks that it runs and trains, and
on a probe what measuring adds to a full step. The same prices give the same study on any machine.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.config import Config, UserError
from bench.costs import PARTS, Costs, Shape, anchors
from bench.expected import Expected, Fixed
from bench.models import model_of, optimizer
from bench.results import read
from bench.tasks.parts import Task
from bench.trials.files import keep
from blocksched import BlockScheduler
from blocksched.schedules import Plan

_ROUNDS = 8
_STEPS = 12  # of each kind, for what measuring adds
# Beside what it runs on; text and finetune train the same model.
_SIZE = ("dmodel", "n_layers", "n_heads", "hidden_mult", "batch_size", "seq_len", "dtype", "device")


class Prices:
    """What a step of a model costs, in milliseconds."""

    def __init__(self, n_blocks: int, plain: Mapping[str, Any]) -> None:
        self._n, self._measuring = n_blocks, plain["measuring"]
        parts = {(name, Shape(*shape)): ms for name, shape, ms in plain["parts"]}
        self._costs = Costs(n_blocks, parts)

    def step_ms(self, plan: Plan) -> float:
        """The price of a step that does `plan`."""
        extra = self._measuring if plan.probe else 0.0
        return self._costs.step_ms(Shape.of(plan, self._n)) + extra

    def block_ms(self) -> tuple[float, float]:
        """What a block's forward and its backward cost."""
        n, sizes = self._n, sorted(s.active for s in anchors(self._n) if not s.stem)
        if len(sizes) < 2:
            whole = self._costs.part_ms("suffix", Shape.suffix(n, n)) / n
            return whole / 3, 2 * whole / 3
        few, many = (Shape.suffix(k, n) for k in (sizes[0], sizes[-1]))
        between = many.active - few.active
        slope = {p: (self._costs.part_ms(p, many) - self._costs.part_ms(p, few)) for p in PARTS}
        forward = max(-slope["stem and prefix"] / between, 0.0)
        return forward, max(slope["suffix"] / between - forward, 0.0)


class Priced:
    """Stands in for blocksched.times.BlockTimes: every block takes what its price says."""

    def __init__(self, n_blocks: int, prices: Prices) -> None:
        self._n, self._ms = n_blocks, prices.block_ms()
        self._measure = False

    def expect(self, measure: bool) -> None:
        """Begin a step."""
        self._measure = measure

    def read(self) -> tuple[list[float], list[float]] | None:
        """Of a step that is measured, the prices of each block's forward and backward."""
        if not self._measure:
            return None
        forward, backward = self._ms
        return [forward] * self._n, [backward] * self._n

    def close(self) -> None:
        """Nothing to leave."""


class PriceList:
    """The prices of a study's models: those given, and those measured, in a file of its folder."""

    def __init__(self, path: Path, given: Path | None = None) -> None:
        self._path, self._given = path, given
        self._known = _read(path) if path.exists() else {}
        if given is not None:
            self._known |= _read(given)

    def of(self, task: Task, config: Config, fused: bool) -> Prices:
        """The prices of a cell's model."""
        size = size_of(config, fused)
        if size not in self._known:
            self._known[size] = _measure(task, config, fused)
            keep(self._path, self._known)
        if not _sound(self._known[size], config.n_layers):
            raise UserError(f"{self._files()} holds no prices of {size}: delete it")
        return Prices(config.n_layers, self._known[size])

    def _files(self) -> str:
        return str(self._path) if self._given is None else f"{self._given} or {self._path}"

    @property
    def content(self) -> dict[str, Any]:
        """All of them, as the file has them."""
        return self._known


def _read(path: Path) -> dict[str, Any]:
    known = read(path)
    if not isinstance(known, dict):
        raise UserError(f"{path} holds no prices: delete it")
    return known


def size_of(config: Config, fused: bool) -> str:
    """What the time of a model's steps depends on."""
    named = {name: getattr(config, name) for name in _SIZE}
    kernels = "compile" if fused and config.backend == "compile" else fused
    return json.dumps(named | {"teacher": config.task == "teacher", "fused": kernels})


def _sound(plain: Any, n_blocks: int) -> bool:
    """Whether there is a finite number for every part."""
    try:
        known = {(name, Shape(*shape)): ms for name, shape, ms in plain["parts"]}
        priced = [plain["measuring"], *(known[n, s] for n in PARTS for s in anchors(n_blocks))]
    except (KeyError, TypeError, ValueError):
        return False
    return all(type(ms) in (int, float) and 0 <= ms < math.inf for ms in priced)


def _measure(task: Task, config: Config, fused: bool) -> dict[str, Any]:
    expected = Expected(task, config, fused)
    for _ in range(_ROUNDS):
        expected.round()
    parts = [[name, shape, statistics.median(ms)] for name, shape, ms in expected.state()["parts"]]
    return {"parts": parts, "measuring": _measuring_ms(task, config, fused)}


def _measuring_ms(task: Task, config: Config, fused: bool) -> float:
    """What a probe takes longer than the full step that it is."""
    model = model_of(task, config, fused)
    trained = optimizer(model, config, fused)
    everything = tuple(range(config.n_layers))
    times: dict[bool, list[float]] = {False: [], True: []}
    inputs, targets = task.batch(0)
    for turn in range(2 * _STEPS):
        probe = bool(turn % 2)
        scheduler = BlockScheduler(
            model, trained, Fixed(Plan(everything, probe=probe)), total_steps=1 << 40,
            blocks="blocks",
        )  # fmt: skip
        for _ in range(2):  # the first is watched: a boundary was set
            _synchronize(task)
            start = time.perf_counter()
            loss = task.loss(task.forward(model, inputs), targets)
            loss.backward()
            trained.step()
            trained.zero_grad()
            scheduler.step(loss.item())
            _synchronize(task)
            ms = (time.perf_counter() - start) * 1e3
        times[probe].append(ms)
        scheduler.close()
    return max(0.0, statistics.median(times[True]) - statistics.median(times[False]))


def _synchronize(task: Task) -> None:
    if task.device.type == "cuda":
        torch.cuda.synchronize(task.device)
