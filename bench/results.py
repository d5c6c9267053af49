"""The result file: figures of every schedule, as strict JSON, written whole or not at all."""

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.config import FUSED, Config, UserError
from bench.costs import Shape
from bench.expected import Expected
from bench.lora import Lora
from bench.provenance import command, processes, system
from bench.tasks.parts import Task
from bench.train import Arm

_SCRIPT = "bench/run.py"
_SEALED = (_SCRIPT, "bench/study.py")  # those that end with the sha256 of the rest
_SEAL = b',\n "sha256": "'


def document(
    config: Config,
    task: Task,
    arms: Sequence[Arm],
    expected: Expected | None,
    budget_ms: float | None,
    status: str,
) -> dict[str, Any]:
    """The result file's content; `status` is running, complete or interrupted."""
    flags = dataclasses.asdict(config)
    flags["device_arg"] = flags.pop("device")
    flags["resolved_device"] = task.device.type
    flags["time_budget_ms"] = budget_ms if config.budget_known else None
    if flags["time_budget_ms"] is None:
        del flags["time_budget_ms"]
    started = [arm for arm in arms if arm.steps]
    names = "full_update", FUSED
    full = {arm.name: arm for arm in started if arm.name in names and arm.failure is None}
    return {
        "script": _SCRIPT,
        "timestamp_utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "status": status,
        "config": flags,
        "command": command(config),
        "system": system(task.device) | processes(),
        "task": task.info,
        "results": [_row(arm, full, config, expected) for arm in started],
        "traces": {arm.name: _trace(arm) for arm in started},
        "expected": None if expected is None else _expected(expected, config.n_layers),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON: NaN and infinities become null. It ends with the sha256 of the rest."""
    write_whole(path, _sealed(json.dumps(_finite(content), indent=1, allow_nan=False).encode()))


def parse(content: bytes) -> Any:
    """What `write` was given, or any other JSON.

    Raises ValueError if it is none, or if it is of `write` and not what that wrote.
    """
    value = json.loads(content)
    if isinstance(value, dict) and (value.get("script") in _SEALED or "sha256" in value):
        body, _, _ = content.rpartition(_SEAL)
        if content != _sealed(body + b"\n}"):
            raise ValueError("it does not have the sha256 that it ends with, so it was changed")
        del value["sha256"]
    return value


def read(path: Path) -> Any:
    """The content of a result file. Raises UserError, in a line, if it cannot be had."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a result file") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON or is cut off ({error}): give a whole result file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text ({error}): give a whole result file") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: give a result file") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file; what was there before stays until all is."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def output_path(config: Config) -> Path:
    """Where the result goes. Raises UserError, before any work, if it cannot be written there."""
    if config.json_out:
        path, flag = Path(config.json_out), "--json-out"
    else:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        path, flag = Path(config.out) / f"{config.task}-{now}-{os.getpid()}.json", "--out"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise FileExistsError(0, "it is a folder or a device")  # /dev/null would be replaced
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp"):
            pass  # as `write_whole` will, its longer name included
    except OSError as error:
        raise UserError(
            f"{flag} must name a place that can be written, got {path} ({error.strerror}): "
            "choose another"
        ) from None
    return path


def quantile(values: Sequence[float], q: float) -> float:
    """The experiment's: sorted(values)[round(q * (len - 1))]."""
    return sorted(values)[round(q * (len(values) - 1))]


def counted_ms(arm: Arm, config: Config) -> list[float]:
    """The step times without the first, warming, ones, unless there are no others."""
    times = [step.ms for step in arm.steps]
    return times[config.warmup_ignore_steps :] or times


def time_to_loss_ms(val_trace: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """When the validation loss first reached `target`, on the line between two validations."""
    if val_trace and val_trace[0]["val_loss"] <= target:
        first: float = val_trace[0]["elapsed_ms"]
        return first
    for before, after in itertools.pairwise(val_trace):
        if before["val_loss"] > target >= after["val_loss"]:
            share = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            span: float = after["elapsed_ms"] - before["elapsed_ms"]
            start: float = before["elapsed_ms"]
            return start + share * span
    return None


def _sealed(content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    return content.removesuffix(b"\n}") + _SEAL + f'{digest}"\n}}\n'.encode()


def _row(
    arm: Arm, full: Mapping[str, Arm], config: Config, expected: Expected | None
) -> dict[str, Any]:
    sound = arm.failure is None  # what failed has no figures that could be taken for a result
    times = counted_ms(arm, config)
    mean_ms = statistics.fmean(times) if sound else None
    full_ms = {name: statistics.fmean(counted_ms(full[name], config)) for name in full}
    baseline, fused = full_ms.get("full_update"), full_ms.get(FUSED) if arm.fused else None
    rival = full.get(FUSED if arm.fused and FUSED in full else "full_update")
    active = [step.active for step in arm.steps]
    expected_ms, over = _against_expected(arm, config, expected if sound else None)
    shared = arm.scheduler.ranks is not None
    return {
        "schedule": arm.name,
        "fused": arm.fused,
        "steps_executed": len(arm.steps),
        "skipped_steps": arm.scheduler.skipped,  # their updates were left out
        "failure": arm.failure,
        "elapsed_ms": sum(step.ms for step in arm.steps),
        "final_val_loss": arm.val_trace[-1]["val_loss"] if arm.finished and sound else None,
        "train_loss_start": arm.steps[0].loss,
        "train_loss_end": arm.steps[-1].loss if sound else None,
        "mean_step_ms": mean_ms,
        "p50_step_ms": quantile(times, 0.5) if sound else None,
        "p90_step_ms": quantile(times, 0.9) if sound else None,
        "speedup_vs_full": baseline and mean_ms and baseline / mean_ms,
        # Its two factors: the kernels alone, and the schedule on top of them.
        "speedup_kernels": baseline and mean_ms and fused and baseline / fused,
        "speedup_schedule": fused and mean_ms and fused / mean_ms,
        "active_layers_mean": statistics.fmean(active),
        "active_layers_min": min(active),
        "active_layers_max": max(active),
        "probe_step_count": sum(step.probe for step in arm.steps),
        "notes": str(arm.schedule),
        "peak_bytes": arm.memory.peak,
        "expected_step_ms": expected_ms,
        "measured_over_expected": over,
        # The loss of the full_update that runs on the same kernels.
        "time_to_full_loss_ms": time_to_loss_ms(arm.val_trace, rival.val_trace[-1]["val_loss"])
        if sound and rival is not None and rival.finished
        else None,
        # What a process gave to the others: gradients to all-reduce, numbers to be agreed on.
        "gradient_bytes_per_step": _mean_of(arm, "gradient_bytes") if shared else None,
        "agreement_bytes_per_step": _mean_of(arm, "agreement_bytes") if shared else None,
        "weights_sha256": arm.weights_sha256,  # at the end; None on a clock, which decides too
    }


def _mean_of(arm: Arm, field: str) -> float:
    return statistics.fmean(getattr(step, field) for step in arm.steps)


def _against_expected(
    arm: Arm, config: Config, expected: Expected | None
) -> tuple[float | None, float | None]:
    """Mean expected step time over the steps counted, and measured over expected.

    Medians by what the steps did, weighted by how often that was. Of models with adapters nothing
    is expected.
    """
    if expected is None or expected.fused != arm.fused or isinstance(arm.schedule, Lora):
        return None, None
    alike: dict[Shape, list[float]] = {}
    for step in arm.steps[config.warmup_ignore_steps :] or arm.steps:
        alike.setdefault(Shape(*step.shape), []).append(step.ms)
    count = sum(map(len, alike.values()))
    wanted = sum(len(ms) * expected.shape_ms(shape) for shape, ms in alike.items())
    measured = sum(len(ms) * statistics.median(ms) for ms in alike.values())
    return wanted / count, measured / wanted


def _trace(arm: Arm) -> dict[str, Any]:
    return {
        "step_times_ms": [step.ms for step in arm.steps],
        "train_losses": [step.loss for step in arm.steps],
        "active_layers_hist": [step.active for step in arm.steps],
        "gradient_bytes": [step.gradient_bytes for step in arm.steps],
        "active_blocks": arm.changes,  # from that step on, these blocks train
        # From that step on, these run; not there where all always did.
        **({"running_blocks": arm.running} if arm.running else {}),
        "readings": arm.readings,
        "probe_steps": [i for i, step in enumerate(arm.steps) if step.probe],
        "parts_ms": arm.phases.sums,  # by number of active blocks, in all
        "memory": arm.memory.bytes,
        "dynamic_trace": arm.dynamic_trace,
        "val_trace": arm.val_trace,
    }


def _expected(expected: Expected, n_blocks: int) -> dict[str, Any]:
    return {
        "step_ms": {k: expected.step_ms(k) for k in range(1, n_blocks + 1)},
        "parts_ms": expected.parts_ms(),
        "measured_over_expected": expected.efficiency(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
