"""Every flag of the benchmark: the one source of its options, their help and the JSON's config."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import torch

from bench.lora import Lora
from bench.presets import FINETUNE, SMALL, preset_flags
from blocksched.schedules.flags import NAMES, base_name, flags_of, option
from blocksched.schedules.numbers import check_numbers, choice, number, text

FUSED = "full_update+fused"
_MOST = 2**40  # numbers in one place: no machine holds as many


class UserError(Exception):
    """Bad input: one line with the rule, the value and the remedy; exit status 2."""


# The flags of each schedule, from its own dataclass.
_BY_SCHEDULE = {name: flags_of(name, Lora if name == "lora" else None) for name in NAMES}
_OfSchedules = dataclasses.make_dataclass(
    "_OfSchedules",
    [(flag.key, flag.kind, flag.declared) for flags in _BY_SCHEDULE.values() for flag in flags],
    frozen=True,
    kw_only=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_OfSchedules):
    """The flags, their defaults as in the original experiment (preset `seed`)."""

    task: str = choice(
        "text",
        "text: a byte-level GPT on real text; finetune: the same, pretrained on Python's own "
        "sources; teacher: the original experiment",
        ("text", "finetune", "teacher"),
    )
    data: str = text("", "tasks on text: a file or folder to train on, as bytes (King James Bible)")
    schedules: str = text(
        "full_update,static_suffix,dynamic_suffix",
        "the schedules to run, in this order: " + ", ".join(NAMES),
    )
    random_like: str = text(
        "", "random_suffix: the result file whose dynamic_suffix it takes its sizes from"
    )
    preset: str = choice(
        "auto",
        "seed: the experiment's size; small: for a CPU; auto: seed on CUDA, else small; "
        "recommended: as auto, against full_update what docs/results.md says, if anything",
        ("auto", "seed", "small", "recommended"),
    )
    backend: str = choice(
        "auto",
        "eager: torch's own layers and AdamW; fused: blocksched's; auto: full_update eager, the "
        "rest fused, and full_update+fused beside them; compile: as auto, what is fused compiled "
        "block by block",
        ("auto", "eager", "fused", "compile"),
    )
    lr_decay: str = choice(
        "auto",
        "learning rate by the fraction of the clock (auto: constant for teacher, else to 0)",
        ("auto", "constant", "linear"),
    )
    interleave: bool = text(
        False, "advance the schedules in small groups of steps, on a budget fixed beforehand"
    )
    time_budget_ms: float | None = number(
        None, "equal time: the budget of every schedule, instead of full_update's time", gt=0
    )
    accept_loss: float = number(
        0.01, "verdict: the relative loss one would give up for speed", ge=0
    )
    out: str = text("results", "folder of the result file")
    json_out: str = text("", "the result file itself, instead of a new one in --out")
    html: bool = text(True, "also write the result as a page, beside the result file")
    resume: str = text(
        "", "folder of this run's checkpoints: go on from the newest, if there is one, and add more"
    )
    checkpoint_every: int = number(
        200, "--resume: steps between checkpoints, those of all schedules counted", ge=1
    )
    allow_previous: bool = text(
        False, "--resume: where the newest checkpoint is damaged, take an older one"
    )
    max_skipped: int = number(
        20,
        "a schedule ends, without a result, after more than so many steps in a row whose loss or "
        "gradients are not finite; their updates are left out",
        ge=0,
    )
    preflight: bool = text(
        False, "first take a full step on a copy and say what memory it takes and what is free"
    )

    device: str = text("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = choice(
        "bfloat16",
        "teacher: the weights' dtype; text: bfloat16 is autocast over float32 weights",
        ("bfloat16", "float32"),
    )
    seed: int = number(42, "the seed of weights and batches", ge=0, le=2**31 - 1)
    dmodel: int = number(1024, "width", ge=1)
    n_layers: int = number(18, "number of blocks", ge=1, le=10_000)
    n_heads: int = number(0, "tasks on text: attention heads (0: one per 64 of the width)", ge=0)
    pretrain_steps: int = number(1000, "task finetune: full steps of pretraining", ge=1)
    pretrain_lr: float = number(3e-4, "task finetune: learning rate of pretraining", gt=0)
    pretrain_batch_size: int = number(8, "task finetune: rows in a batch of pretraining", ge=1)
    hidden_mult: int = number(4, "hidden width of the fused layer / width", ge=1)
    batch_size: int = number(8, "rows in a batch", ge=1)
    seq_len: int = number(1024, "positions in a row", ge=1)
    steps: int = number(200, "steps of full_update, which set the time budget", ge=1)
    equal_time_budget: bool = text(False, "give every schedule the time of full_update")
    max_steps_multiplier: float = number(
        3.0, "equal time: at most so many times --steps", ge=1, le=1e6
    )
    lr: float = number(3e-4, "learning rate of AdamW", gt=0)
    weight_decay: float = number(0.0, "weight decay of AdamW", ge=0)
    teacher_noise: float = number(0.02, "teacher: the student's distance at the start", ge=0)
    val_batches: int = number(4, "batches of each validation", ge=1)
    warmup_ignore_steps: int = number(5, "first steps left out of the step-time figures", ge=0)

    @property
    def names(self) -> list[str]:
        """The schedules to run."""
        return [name.strip() for name in self.schedules.split(",") if name.strip()]

    def arms(self, can_fuse: bool) -> dict[str, bool]:
        """The runs by name, and whether each is fused; "+fused" beside a full_update that is not.

        Raises UserError if the kernels are asked for and are not there.
        """
        if self.backend in ("fused", "compile") and not can_fuse:
            raise UserError(
                f"--backend {self.backend} needs blocksched's extension for this device, which was "
                "not built: python -m blocksched says why, --backend eager does without"
            )
        if self.backend == "fused":
            return dict.fromkeys(self.names, True)
        fused = self.backend != "eager" and can_fuse
        arms: dict[str, bool] = {}
        for name in self.names:
            eager = base_name(name) == "full_update"
            arms[name] = fused and not eager
            if fused and name == "full_update":
                arms[FUSED] = True
        return arms

    @property
    def limit(self) -> int:
        """The most steps a schedule may run at equal time."""
        return max(self.steps, round(self.steps * self.max_steps_multiplier))

    @property
    def budget_known(self) -> bool:
        """Whether the time budget is fixed before the first schedule runs."""
        return self.equal_time_budget and (self.interleave or self.time_budget_ms is not None)


_NEW = {"task", "random_like", "data", "schedules", "preset", "backend", "lr_decay", "interleave",
        "time_budget_ms", "accept_loss", "out", "json_out", "html", "n_heads", "pretrain_steps",
        "pretrain_lr", "pretrain_batch_size", "resume", "checkpoint_every", "allow_previous",
        "max_skipped", "preflight"}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line, built from Config."""
    made = argparse.ArgumentParser(
        prog="bench/run.py",
        usage="bench/run.py [flags]",
        description="Train under several schedules and compare.",
        epilog="Defaults are the experiment's (preset seed); on a CPU those of preset small hold: "
        + ", ".join(f"{option(name)} {value}" for name, value in SMALL.items())
        + "; with task finetune "
        + ", ".join(f"{option(name)} {value}" for name, value in FINETUNE.items()),
    )
    made.add_argument(
        "--replay",
        nargs="+",
        metavar="FILE",
        help="compare recorded runs with what their schedules decide now; with --schedules: what "
        "these would have done on them",
    )
    hints = get_type_hints(Config)
    groups = {}
    for name, flags in _BY_SCHEDULE.items():
        group = made.add_argument_group(name) if flags else made
        groups |= {flag.key: group for flag in flags}
    for field in dataclasses.fields(Config):
        default = "none" if field.default is None else field.default
        words = field.metadata["help"] + ("" if default == "" else f" (default {default})")
        words = words.replace("%", "%%")
        place = groups.get(field.name, made)
        if hints[field.name] is bool:
            place.add_argument(
                option(field.name), action=argparse.BooleanOptionalAction, default=None, help=words
            )
            continue
        kinds = [t for t in get_args(hints[field.name]) if t is not type(None)]
        kind = kinds[0] if kinds else hints[field.name]
        place.add_argument(option(field.name), type=kind, default=None, metavar="X", help=words)
    return made


def resolve(given: dict[str, Any]) -> Config:
    """The config of a run from the flags `given` on the command line.

    Raises UserError for a flag out of range, and for flags that contradict each other.
    """
    device = resolve_device(given.get("device", "auto"))
    preset, task = given.get("preset", "auto"), given.get("task", "text")
    config = Config(**{**preset_flags(preset, task, small=device.type != "cuda"), **given})
    try:
        check_numbers(config, option)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.lr_decay == "auto":
        by_task = "constant" if config.task == "teacher" else "linear"
        config = dataclasses.replace(config, lr_decay=by_task)
    _check_sizes(config)
    _check_together(config)
    if config.dtype == "bfloat16" and device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            raise UserError(
                "--dtype bfloat16 needs a GPU that has it, this one does not: use --dtype float32"
            )
    return config


def from_experiment(given: Sequence[str]) -> bool:
    """Whether a flag of the original experiment that shapes the run is on the command line."""
    return any(name not in _NEW | {"device", "seed"} for name in given)


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`. Raises UserError if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name if name.startswith(("cpu", "cuda")) else "meta")
    except RuntimeError:
        device = torch.device("meta")
    local = os.environ.get("LOCAL_RANK")
    if local is not None and device.type == "cuda":
        if device.index is not None:
            raise UserError(
                f"--device must not number the GPU under torchrun, got {name}: say cuda, each "
                "process takes its own"
            )
        device = torch.device("cuda", int(local))
    here = 1 if device.type == "cpu" else torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= here:
        raise UserError(
            f"--device must be auto, cpu, cuda or cuda:N of a GPU that is here "
            f"({torch.cuda.device_count()} found), got {name if local is None else device}: choose "
            "one of these"
        )
    return device


def _check_sizes(config: Config) -> None:
    tokens = config.batch_size * config.seq_len
    hidden = config.dmodel * config.hidden_mult
    sizes = {
        "--n-layers x --dmodel x --dmodel x --hidden-mult": config.n_layers
        * config.dmodel
        * hidden,
        "--batch-size x --seq-len x --dmodel x --hidden-mult": tokens * hidden,
        "--batch-size x --seq-len x --val-batches": tokens * config.val_batches,
    }
    for product, size in sizes.items():
        if size > _MOST:
            raise UserError(
                f"{product} must be at most {_MOST}, for no machine holds more, got {size}: lower "
                "one of them"
            )


def _check_together(config: Config) -> None:
    names = config.names
    if not names:
        raise UserError("--schedules must name at least one schedule, got none: see --help")
    if FUSED in names:
        raise UserError(
            f"--schedules must not name {FUSED}: --backend auto adds it, --backend fused runs all "
            "fused"
        )
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise UserError(f"--schedules names {doubled} twice: call the second one {doubled}#2")
    if config.dyn_loss_lower > config.dyn_loss_upper:
        raise UserError(
            f"--dyn-loss-lower must not exceed --dyn-loss-upper, got {config.dyn_loss_lower} > "
            f"{config.dyn_loss_upper}: lower the first or raise the second"
        )
    if "random_suffix" in map(base_name, names) and not config.random_counts:
        raise UserError(
            "--schedules random_suffix trains suffixes of the sizes of a recorded run: give its "
            "result file to --random-like, or the steps of each size to --random-counts"
        )
    if config.allow_previous and not config.resume:
        raise UserError("--allow-previous is about checkpoints: add --resume with their folder")
    if config.time_budget_ms is not None and not config.equal_time_budget:
        raise UserError("--time-budget-ms needs --equal-time-budget: add it, or drop the budget")
    alone = config.equal_time_budget and "full_update" not in names
    if alone and config.time_budget_ms is None:
        raise UserError(
            "--equal-time-budget takes its budget from full_update, which is not in --schedules: "
            "add it, or give --time-budget-ms"
        )
