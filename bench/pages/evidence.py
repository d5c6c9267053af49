"""What a result file says, checked: of this benchmark or of the original experiment."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.config import Config, UserError
from bench.pages.checks import count, listed, mapping, number, number_or_none, short
from bench.phases import PARTS
from bench.results import read

ORIGINAL = "dynamic_block_update_schedule_bench.py"  # the experiment's script, of 20 fields a row
_SCRIPTS = ("bench/run.py", ORIGINAL)
_COUNTS = ("steps_executed", "probe_step_count", "skipped_steps", "peak_bytes")
_FIGURES = (
    *("elapsed_ms", "final_val_loss", "train_loss_start", "train_loss_end", "mean_step_ms"),
    *("p50_step_ms", "p90_step_ms", "speedup_vs_full", "speedup_kernels", "speedup_schedule"),
    *("active_layers_mean", "active_layers_min", "active_layers_max", "expected_step_ms"),
    *("measured_over_expected", "time_to_full_loss_ms", "gradient_bytes_per_step"),
)
_WORDS = ("notes", "failure")
_UNKNOWN = dict.fromkeys(("fused", *_COUNTS, *_FIGURES, *_WORDS))


class Validation(NamedTuple):
    """A point of the validation curve; no loss if it was not finite."""

    step: int
    ms: float
    loss: float | None


class Change(NamedTuple):
    """From step `step` on exactly `blocks` train."""

    step: int
    blocks: tuple[int, ...]


class Probe(NamedTuple):
    """A full step that was measured. `relevance` is the average that decides, one number a block,
    where the schedule keeps one; `freezing` tells whether freezing had begun."""

    step: int
    relevance: tuple[float, ...] | None
    freezing: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One schedule's run; what its file does not have is None or empty.

    Attributes:
        row: its line of `results`: every field of the benchmark's, None where unknown.
        step_ms, losses: a number a step, None where it was not finite.
        active: blocks trained, by step.
        changes: which ones, from the first step on; each differs from the one before.
        running: likewise, which blocks ran at all; () where all did in every step.
        probes: in order.
        freezing: the first step at which blocks could be frozen, None if that never came.
        recovery: the steps at which stages of the recovery at the end begin, with their names.
        validations: the validation curve.
        parts_ms: by number of active blocks, the sum over its steps of each part of a step.
        memory: by number of active blocks, bytes.
    """

    name: str
    row: Mapping[str, Any]
    step_ms: Sequence[float | None]
    losses: Sequence[float | None]
    active: Sequence[int]
    changes: Sequence[Change]
    running: Sequence[Change]
    probes: Sequence[Probe]
    freezing: int | None
    recovery: Sequence[tuple[int, str]]
    validations: Sequence[Validation]
    parts_ms: Mapping[int, Mapping[str, float]]
    memory: Mapping[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A result file.

    Attributes:
        name: the file's, without folder and suffix.
        content: all of it, as it stands there, its rows completed as in `Run.row`.
        status: complete, interrupted or running.
        n_blocks: depth of the model.
        runs: a schedule each, in the file's order.
        budget_ms: the time that every schedule had; None where all had equally many steps.
        expected_ms: what a step should cost by number of active blocks, {} where unknown.
    """

    name: str
    content: Mapping[str, Any]
    status: str
    n_blocks: int
    runs: Sequence[Run]
    budget_ms: float | None
    expected_ms: Mapping[int, float]

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's flags."""
        flags: Mapping[str, Any] = self.content["config"]
        return flags

    @property
    def on_cpu(self) -> bool:
        """Whether it ran on a CPU: its memory is then what a forward keeps for backward."""
        return bool(self.config.get("resolved_device", "cpu") == "cpu")

    def times_by_active(self, run: Run) -> dict[int, list[float]]:
        """A run's step times by number of active blocks, fewest first, without the first, warming,
        steps unless there are no others."""
        warming = self.config.get("warmup_ignore_steps", 0)
        steps = list(zip(run.active, run.step_ms, strict=True))
        found: dict[int, list[float]] = {}
        for k, ms in steps[warming:] or steps:
            if ms is not None:
                found.setdefault(k, []).append(ms)
        return dict(sorted(found.items()))


def load(path: Path) -> Evidence:
    """Raises UserError, in a line, for a file that cannot be read or is no result."""
    content = read(path)
    try:
        return evidence(content, path.stem)
    except ValueError as error:
        raise UserError(f"{path} is not a result of bench/run.py: {error}") from None


def evidence(content: Any, name: str) -> Evidence:
    """What the content of a result file says. Raises ValueError if it is none."""
    top = mapping(content, "the file")
    script = top.get("script")
    if script not in _SCRIPTS:
        raise ValueError(f"its script is {script!r}, not {' or '.join(map(repr, _SCRIPTS))}")
    config = _config(top.get("config"))
    n_blocks = count(config.get("n_layers"), "config's n_layers")
    if n_blocks < 1:
        raise ValueError(f"config's n_layers must be >= 1, got {n_blocks}")
    traces = mapping(top.get("traces", {}), "traces")
    for part in ("system", "task"):
        mapping(top.get(part, {}), part)
    rows = [_row(row, i) for i, row in enumerate(listed(top.get("results"), "results"))]
    names = [row["schedule"] for row in rows]
    twice = [one for i, one in enumerate(names) if one in names[:i]]
    if twice:
        raise ValueError(f"it has two results of {twice[0]!r}")
    runs = [
        _run(row, mapping(traces.get(row["schedule"], {}), "a trace"), n_blocks) for row in rows
    ]
    budget = config.get("time_budget_ms")
    if budget is None and config.get("equal_time_budget"):
        budget = next((row["elapsed_ms"] for row in rows if row["schedule"] == "full_update"), None)
    status = top.get("status", "complete")
    if status not in ("complete", "interrupted", "running"):
        raise ValueError(f"its status is {status!r}")
    return Evidence(
        name=name,
        content={"task": {}, "system": {}, "traces": {}, **top, "results": rows},
        status=status,
        n_blocks=n_blocks,
        runs=runs,
        budget_ms=None if budget is None else number(budget, "config's time_budget_ms"),
        expected_ms=_expected(top.get("expected")),
    )


def _config(value: Any) -> Mapping[str, Any]:
    """The flags, those that Config has of the kind that it has them."""
    config = mapping(value, "config")
    for name, default in dataclasses.asdict(Config()).items():
        found = config.get(name, default)
        kind = (int, float) if isinstance(default, float) else type(default)
        fits = isinstance(found, kind) and isinstance(found, bool) == isinstance(default, bool)
        if default is not None and not fits:
            raise ValueError(f"config's {name} must be like {default!r}, got {short(found)}")
    count(config.get("warmup_ignore_steps", 0), "config's warmup_ignore_steps")
    return config


def _row(row: Any, i: int) -> dict[str, Any]:
    found = {**_UNKNOWN, **mapping(row, f"results[{i}]")}
    name = found.get("schedule")
    if not isinstance(name, str) or not name:
        raise ValueError(f"results[{i}] has no schedule's name")
    for field in _FIGURES:
        found[field] = number_or_none(found[field], f"{field} of {name!r}")
    for field in _COUNTS:
        if found[field] is not None:
            count(found[field], f"{field} of {name!r}")
    for field in _WORDS:
        if not isinstance(found[field], str | None):
            raise ValueError(f"{field} of {name!r} must be text, got {found[field]!r}")
    return found


def _run(row: Mapping[str, Any], trace: Mapping[str, Any], n: int) -> Run:
    name = row["schedule"]
    step_ms = _numbers(trace, "step_times_ms", name)
    losses = _numbers(trace, "train_losses", name)
    active = [
        count(k, f"active_layers_hist of {name!r}", n)
        for k in listed(trace.get("active_layers_hist", []), f"active_layers_hist of {name!r}")
    ]
    lengths = {len(step_ms), len(losses), len(active)}
    if len(lengths) > 1:
        raise ValueError(f"the traces of {name!r} have different lengths: {sorted(lengths)}")
    events = [
        mapping(event, f"dynamic_trace of {name!r}")
        for event in listed(trace.get("dynamic_trace", []), f"dynamic_trace of {name!r}")
    ]
    probes, freezing, recovery = _story(events, name, n)
    probes = probes or [
        Probe(count(step, f"probe_steps of {name!r}"), None, None)
        for step in listed(trace.get("probe_steps", []), f"probe_steps of {name!r}")
    ]
    return Run(
        name=name,
        row=row,
        step_ms=step_ms,
        losses=losses,
        active=active,
        changes=_changes(trace, active, name, n),
        running=_sets(trace, "running_blocks", active, name, n)
        if "running_blocks" in trace
        else (),
        probes=probes,
        freezing=freezing,
        recovery=recovery,
        validations=_validations(trace, name),
        parts_ms={
            _key(k, name): _parts(parts, f"parts_ms of {name!r}")
            for k, parts in mapping(trace.get("parts_ms", {}), f"parts_ms of {name!r}").items()
        },
        memory={
            _key(k, name): count(size, f"memory of {name!r}")
            for k, size in mapping(trace.get("memory", {}), f"memory of {name!r}").items()
        },
    )


def _story(
    events: Sequence[Mapping[str, Any]], name: str, n: int
) -> tuple[list[Probe], int | None, list[tuple[int, str]]]:
    """The probes, freezing's start and the recovery's stages of a dynamic_trace."""
    probes, freezing, recovery = [], None, []
    for event in events:
        step = count(event.get("step"), f"a step in dynamic_trace of {name!r}")
        if event.get("probe"):
            if probes and step <= probes[-1].step:
                raise ValueError(f"the probes of {name!r} are not in order at step {step}")
            for field in ("active_layers_next", "active_budget"):
                count(event.get(field), f"{field} in dynamic_trace of {name!r}")
            scores = _numbers(event, "ema_scores", name)
            if len(scores) != n:
                raise ValueError(
                    f"ema_scores of {name!r} at step {step} are {len(scores)}, the model has {n} "
                    "blocks"
                )
            finite = tuple(score for score in scores if score is not None)
            relevance = finite if len(finite) == n else None
            probes.append(Probe(step, relevance, bool(event.get("freeze_enabled"))))
        elif "freeze_trigger" in event:
            freezing = step
        elif "final_recovery_stage" in event:
            recovery.append((step, str(event["final_recovery_stage"])))
    return probes, freezing, recovery


def _changes(trace: Mapping[str, Any], active: Sequence[int], name: str, n: int) -> list[Change]:
    """What is recorded or else, of suffixes, what the numbers of blocks say."""
    if "active_blocks" not in trace:
        return [
            Change(step, tuple(range(n - k, n)))
            for step, (before, k) in enumerate(itertools.pairwise([None, *active]))
            if k != before
        ]
    return _sets(trace, "active_blocks", active, name, n)


def _sets(
    trace: Mapping[str, Any], field: str, active: Sequence[int], name: str, n: int
) -> list[Change]:
    """Sets of blocks with the step that each holds from, checked."""
    what = f"{field} of {name!r}"
    changes: list[Change] = []
    for entry in listed(trace[field], what):
        pair = listed(entry, what)
        if len(pair) != 2:
            raise ValueError(f"{what} must be pairs, got {entry!r}")
        step = count(pair[0], f"a step in {what}")
        if step <= (changes[-1].step if changes else -1):
            raise ValueError(f"{what} is not in order at step {step}")
        blocks = [count(b, f"a block in {name!r}", n - 1) for b in listed(pair[1], "blocks")]
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"{what} names a block twice at step {step}")
        changes.append(Change(step, tuple(sorted(blocks))))
    if active and (not changes or changes[0].step):
        raise ValueError(f"{what} must begin at step 0")
    return changes


def _validations(trace: Mapping[str, Any], name: str) -> list[Validation]:
    found = []
    for point in listed(trace.get("val_trace", []), f"val_trace of {name!r}"):
        entry = mapping(point, f"val_trace of {name!r}")
        found.append(
            Validation(
                count(entry.get("step"), f"a step in val_trace of {name!r}"),
                number(entry.get("elapsed_ms"), f"elapsed_ms in val_trace of {name!r}"),
                number_or_none(entry.get("val_loss"), f"val_loss of {name!r}"),
            )
        )
    return found


def _parts(value: Any, what: str) -> dict[str, float]:
    parts = mapping(value, what)
    wanted = {"steps", *PARTS, "other"}
    if set(parts) != wanted:
        raise ValueError(f"{what} must have {', '.join(sorted(wanted))}, got {short(list(parts))}")
    if count(parts["steps"], f"steps in {what}") < 1:
        raise ValueError(f"{what} counts no step: it must not stand there then")
    return {part: number(ms, what) for part, ms in parts.items()}


def _expected(expected: Any) -> dict[int, float]:
    """What a step should cost: written by number of blocks or, in older files, in parts."""
    if expected is None:
        return {}
    found = mapping(expected, "expected")
    if "step_ms" in found:
        steps = mapping(found["step_ms"], "expected step_ms")
        return {_key(k, "expected"): number(ms, "expected step_ms") for k, ms in steps.items()}
    parts = mapping(found.get("parts_ms", {}), "expected parts_ms")
    sums: dict[int, float] = {}
    for name, by_active in parts.items():
        if name != "step":
            for k, ms in mapping(by_active, "expected parts_ms").items():
                key = _key(k, "expected")
                sums[key] = sums.get(key, 0.0) + number(ms, "expected parts_ms")
    return sums


def _numbers(trace: Mapping[str, Any], field: str, name: str) -> list[float | None]:
    what = f"{field} of {name!r}"
    return [number_or_none(value, what) for value in listed(trace.get(field, []), what)]


def _key(text: str, what: str) -> int:
    if not (isinstance(text, str) and text.isascii() and text.isdecimal()):
        raise ValueError(f"numbers of blocks in {what!r} must be whole, got {text!r}")
    return int(text)
