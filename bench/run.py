"""Train under several schedules and compare them: `python bench/run.py --help`.

Exit status: 0 done; 1 a replay differs; 2 bad input, or a file that cannot be written; 3 done, but
a schedule has no result, its numbers not being finite; 130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

import collections
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench.config import Config, UserError, from_experiment, parser, resolve, resolve_device
from bench.pages.evidence import load
from bench.processes import Processes, Share, only_rank_0_speaks
from bench.replays import replay_files
from bench.report import beside, check_target, write_page
from bench.results import output_path
from bench.runner import Run, Terminated, schedule_of
from bench.table import table
from bench.tasks.finetune import FinetuneTask
from bench.tasks.parts import Task
from bench.tasks.teacher import TeacherTask
from bench.tasks.text import TextTask
from bench.verdict import faults, verdict
from blocksched.extension import why_not
from blocksched.ops import backend_of
from blocksched.schedules import Schedule
from blocksched.schedules.flags import option

TASKS = {"text": TextTask, "finetune": FinetuneTask, "teacher": TeacherTask}
_COMPILED = (
    "full_update in eager torch; all others on blocksched's kernels, each block by torch.compile:"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or a replay, and return the exit status."""
    with only_rank_0_speaks():
        given = {k: v for k, v in vars(parser().parse_args(argv)).items() if v is not None}
        try:
            for name, value in given.items():
                if value == []:  # what argparse makes of it
                    raise UserError(f"{option(name)} needs a value, got --: give another")
            if "replay" in given:
                return replay_files(given)
            if "random_like" in given:
                given["random_counts"] = _sizes(Path(given["random_like"]))
            config = resolve(given)
            if "task" not in given and from_experiment(list(given)):
                print("The task is text; the original experiment's is --task teacher.")
            device = resolve_device(config.device)
            processes = Processes(device)
            try:
                return benchmark(config, device, processes)
            finally:
                processes.stop()
        except UserError as error:
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            return 2


def benchmark(config: Config, device: torch.device, processes: Processes) -> int:
    """Run every schedule, print the table and the verdict, write the result file."""
    can_fuse = backend_of("mlp", device.type) != "eager"
    arms = config.arms(can_fuse)
    schedules = _schedules(config, arms)

    def prepare() -> tuple[Task, Path]:
        task: Task = Share(TASKS[config.task](config, device), processes, config.batch_size)
        path = output_path(config)
        if config.html:
            check_target(beside([path]), [path])
        return task, path

    task, path = processes.together(prepare)
    _greet(config, task, processes)
    if config.backend == "auto" and not can_fuse:
        print(f"All in eager torch: {why_not()}.")
    run = Run(config, task, schedules, path, processes)
    previous = signal.signal(signal.SIGTERM, run.termination)
    try:
        run.all()
    except KeyboardInterrupt as interrupt:
        run.save("interrupted")
        if config.html and processes.rank == 0:
            write_page([load(path)], beside([path]))
        again = "; the same command goes on" if run.termination.gentle else ""
        print(f"\nInterrupted; what was measured is in {path}{again}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    result = run.save_together("complete")
    print()
    if config.backend == "compile":
        print(_COMPILED)
    print("\n".join(table(result["results"], task.device.type == "cpu")))
    print("\n" + run.efficiency_line())
    print("\n".join(["", *faults(result["results"]), *verdict(result), "", f"Result file: {path}"]))
    if config.html:
        processes.first(lambda: write_page([load(path)], beside([path])))
        print(f"As a page: {beside([path])}")
    return 3 if any(arm.failure is not None for arm in run.arms) else 0


def _schedules(config: Config, arms: dict[str, bool]) -> dict[str, tuple[Schedule[Any], bool]]:
    """Each run's schedule, and whether it is fused."""
    made = {}
    heard = set()
    for name, fused in arms.items():
        schedule, warnings = schedule_of(name, config)
        made[name] = schedule, fused
        for warning in warnings:
            if warning not in heard:
                print(f"warning: {warning}", file=sys.stderr)
        heard.update(warnings)
    return made


def _sizes(path: Path) -> str:
    """How many steps of a result file's dynamic_suffix had 1, 2, ... active blocks, as a flag."""
    recorded = load(path)
    run = next((run for run in recorded.runs if run.name == "dynamic_suffix"), None)
    if run is None or not run.active:
        raise UserError(f"--random-like {path} holds no dynamic_suffix: give a result that ran it")
    sizes = collections.Counter(run.active)
    return ",".join(str(sizes[k]) for k in range(1, recorded.n_blocks + 1))


def _greet(config: Config, task: Task, processes: Processes) -> None:
    size = f"{config.n_layers} blocks of width {config.dmodel}, {config.batch_size} x "
    print(f"Task {config.task}: {size}{config.seq_len} positions, {config.dtype}, {task.device}.")
    if processes.world > 1:
        print(
            f"{processes.world} processes over {processes.backend}, "
            f"{config.batch_size // processes.world} rows of each batch to each."
        )
    if "corpus" in task.info:
        info = task.info
        print(
            f"Text: {info['corpus']}, {info['corpus_train_bytes']:,} bytes to train on and "
            f"{info['corpus_val_bytes']:,} to validate; sha256 {info['corpus_sha256'][:16]}."
        )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    sys.exit(main())
