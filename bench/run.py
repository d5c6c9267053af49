"""Train under several schedules and compare them: `python bench/run.py --help`.

Exit status: 0 done; 1 a replay differs; 2 bad input; 130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

import dataclasses
import json
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.config import Config, UserError, from_experiment, parser, resolve, resolve_device
from bench.expected import Expected
from bench.live import Live
from bench.results import document, output_path, write
from bench.table import table
from bench.tasks.finetune import FinetuneTask
from bench.tasks.parts import Task
from bench.tasks.teacher import TeacherTask
from bench.tasks.text import TextTask
from bench.train import Arm
from bench.verdict import verdict
from blocksched.extension import why_not
from blocksched.ops import backend_of
from blocksched.schedules import FullUpdate, Schedule
from blocksched.schedules.flags import from_flags
from blocksched.schedules.replay import replay

TASKS = {"text": TextTask, "finetune": FinetuneTask, "teacher": TeacherTask}
GROUP = 5  # steps a schedule advances at a time when interleaved
_COMPILED = (
    "full_update in eager torch; all others on blocksched's kernels, each block by torch.compile:"
)
_SHOWN = 5  # differences of a replay that are printed


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or a replay, and return the exit status."""
    given = {k: v for k, v in vars(parser().parse_args(argv)).items() if v is not None}
    try:
        if "replay" in given:
            return replay_files(given["replay"])
        config = resolve(given)
        if "task" not in given and from_experiment(list(given)):
            print("The task is text; the original experiment's is --task teacher.")
        return benchmark(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def replay_files(names: Sequence[str]) -> int:
    """Replay recorded runs; 1 if a decision differs. Raises UserError for an unreadable file."""
    differ = False
    for name in names:
        try:
            steps, differences = replay(json.loads(Path(name).read_text()))
        except OSError as error:
            raise UserError(
                f"{name} cannot be read ({error.strerror}): give a result file"
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name} is not JSON or is cut off ({error}): give a whole result file"
            ) from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{name} cannot be replayed: {error}") from None
        print(f"{name}: {steps} steps, {len(differences)} differences")
        for difference in differences[:_SHOWN]:
            print(f"  {difference}")
        differ = differ or bool(differences)
    return int(differ)


def benchmark(config: Config) -> int:
    """Run every schedule, print the table and the verdict, write the result file."""
    device = resolve_device(config.device)
    can_fuse = backend_of("mlp", device.type) != "eager"
    schedules = _schedules(config, config.arms(can_fuse))
    task: Task = TASKS[config.task](config, device)
    path = output_path(config)
    _greet(config, task)
    if config.backend == "auto" and not can_fuse:
        print(f"All in eager torch: {why_not()}.")
    run = Run(config, task, schedules, path)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        run.all()
    except KeyboardInterrupt as interrupt:
        run.save("interrupted")
        print(f"\nInterrupted; what was measured is in {path}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    result = run.save("complete")
    print()
    if config.backend == "compile":
        print(_COMPILED)
    print("\n".join(table(result["results"], task.device.type == "cpu")))
    print("\n" + run.efficiency_line())
    print("\n".join(["", *verdict(result), "", f"Result file: {path}"]))
    return 0


class Run:
    """The schedules of one run, in turn or interleaved."""

    def __init__(
        self,
        config: Config,
        task: Task,
        schedules: dict[str, tuple[Schedule[Any], bool]],
        path: Path,
    ) -> None:
        self.config, self.task, self.schedules, self.path = config, task, schedules, path
        self.arms: list[Arm] = []
        self.expected: Expected | None = None
        self.budget_ms: float | None = None
        self._live = Live()
        self._validations = 0

    def all(self) -> None:
        """Run everything; the result file is renewed whenever a schedule ends."""
        config = self.config
        fused = any(fused for _, fused in self.schedules.values())
        # Its first round also compiles, before any clock starts, every graph that steps run.
        self.expected = Expected(self.task, config, fused)
        if config.budget_known:
            self.budget_ms = config.time_budget_ms or self._measured_budget_ms()
            print(f"Every schedule gets {self.budget_ms / 1e3:.1f} s of step time.\n")
        if config.interleave:
            self.arms = [self._arm(name) for name in self.schedules]
            while running := [arm for arm in self.arms if not arm.finished]:
                self._advance(min(running, key=lambda arm: arm.elapsed_ms), GROUP)
            return
        names = list(self.schedules)
        if config.equal_time_budget and not config.budget_known:
            names.sort(key=lambda name: name != "full_update")
        for name in names:
            arm = self._arm(name)
            self.arms.append(arm)
            while not arm.finished:
                self._advance(arm, GROUP)
            if name == "full_update" and config.equal_time_budget and self.budget_ms is None:
                self.budget_ms = arm.elapsed_ms

    def save(self, status: str) -> dict[str, Any]:
        """Write the result file and return its content, schedules in the order asked for."""
        order = list(self.schedules)
        arms = sorted(self.arms, key=lambda arm: order.index(arm.name))
        result = document(self.config, self.task, arms, self.expected, self.budget_ms, status)
        write(self.path, result)
        return result

    def efficiency_line(self) -> str:
        """How whole steps compare with the sum of their parts, measured in this run."""
        assert self.expected is not None
        found = ", ".join(f"k={k} {over:.3f}" for k, over in self.expected.efficiency().items())
        return (
            f"Whole steps over the sum of their parts, in {self.expected.rounds} rounds of their "
            f"own: {found} (bench/steps.py takes more rounds)."
        )

    def _arm(self, name: str) -> Arm:
        schedule, fused = self.schedules[name]
        return Arm(name, schedule, self.task, self.config, self.budget_ms, fused)

    def _advance(self, arm: Arm, steps: int) -> None:
        validated = arm.advance(steps)
        if validated and self.expected is not None:
            self._validations += 1
            if self._validations % len(self.schedules) == 0:
                self.expected.round()
        self._live.update(self.arms, arm, validated, self.config.n_layers)
        if arm.finished:
            self.save("running")

    def _measured_budget_ms(self) -> float:
        """--steps times the median of a few full steps, which are then discarded."""
        few = dataclasses.replace(self.config, steps=10)
        fused = self.schedules["full_update"][1] if "full_update" in self.schedules else False
        sample = Arm("full_update", FullUpdate(), self.task, few, None, fused)
        sample.advance(few.steps)
        return self.config.steps * statistics.median(step.ms for step in sample.steps[3:])


def _schedules(config: Config, arms: dict[str, bool]) -> dict[str, tuple[Schedule[Any], bool]]:
    """Each run's schedule, and whether it is fused."""
    made = {}
    heard = set()
    for name, fused in arms.items():
        try:
            schedule, warnings = from_flags(name, dataclasses.asdict(config))
            schedule.init(config.n_layers)
            made[name] = schedule, fused
        except ValueError as error:
            raise UserError(f"--schedules {name}: {error}") from None
        for warning in warnings:
            if warning not in heard:
                print(f"warning: {warning}", file=sys.stderr)
        heard.update(warnings)
    return made


def _greet(config: Config, task: Task) -> None:
    size = f"{config.n_layers} blocks of width {config.dmodel}, {config.batch_size} x "
    print(f"Task {config.task}: {size}{config.seq_len} positions, {config.dtype}, {task.device}.")
    if "corpus" in task.info:
        info = task.info
        print(
            f"Text: {info['corpus']}, {info['corpus_train_bytes']:,} bytes to train on and "
            f"{info['corpus_val_bytes']:,} to validate; sha256 {info['corpus_sha256'][:16]}."
        )


def _terminate(_signal: int, _frame: Any) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
