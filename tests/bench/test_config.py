"""The flags: names, defaults, presets and what contradicts what."""

import dataclasses

import pytest

from bench.config import (
    Config,
    UserError,
    from_experiment,
    parser,
    resolve,
)
from bench.presets import RECOMMENDED, SMALL, preset_flags

EXPERIMENT = {
    "device": "auto",
    "dtype": "bfloat16",
    "seed": 42,
    "dmodel": 1024,
    "n-layers": 18,
    "hidden-mult": 4,
    "batch-size": 8,
    "seq-len": 1024,
    "steps": 200,
    "equal-time-budget": False,
    "max-steps-multiplier": 3.0,
    "lr": 3e-4,
    "weight-decay": 0.0,
    "teacher-noise": 0.02,
    "val-batches": 4,
    "warmup-ignore-steps": 5,
    "static-active-layers": 6,
    "dyn-warmup-steps": 40,
    "dyn-probe-every": 20,
    "dyn-refresh-every": 80,
    "dyn-relevance-metric": "grad_ratio",
    "dyn-relevance-threshold": 0.9,
    "dyn-min-active-layers": 4,
    "dyn-max-active-layers": 0,
    "dyn-adapt-budget": False,
    "dyn-freeze-start-step": -1,
    "dyn-freeze-start-frac": 0.5,
    "dyn-require-stable": False,
    "dyn-stability-window": 12,
    "dyn-stability-rel-change": 0.02,
    "dyn-stability-cv": 0.03,
    "dyn-final-full-frac": 0.0,
    "dyn-final-recovery-mode": "full",
    "dyn-final-recovery-stage1-progress": 0.34,
    "dyn-final-recovery-stage2-progress": 0.67,
    "dyn-final-recovery-stage1-layers": 14,
    "dyn-final-recovery-stage2-layers": 16,
    "dyn-loss-upper": 1.03,
    "dyn-loss-lower": 0.995,
    "dyn-budget-step-up": 2,
    "dyn-budget-step-down": 1,
    "dyn-loss-ema-decay": 0.9,
    "dyn-ema-decay": 0.9,
    "dyn-eps": 1e-8,
    "json-out": "",
}
OURS = {
    "task": "text",
    "data": "",
    "schedules": "full_update,static_suffix,dynamic_suffix",
    "preset": "auto",
    "backend": "auto",
    "lr-decay": "auto",
    "interleave": False,
    "time-budget-ms": None,
    "accept-loss": 0.01,
    "out": "results",
    "html": True,
    "resume": "",
    "checkpoint-every": 200,
    "allow-previous": False,
    "max-skipped": 20,
    "random-like": "",
    "preflight": False,
    "n-heads": 0,
    "pretrain-steps": 1000,
    "pretrain-lr": 3e-4,
    "pretrain-batch-size": 8,
}
OF_SCHEDULES = {
    "random-counts": "",
    "lisa-active": 2,
    "lisa-interval": 10,
    "cyclic-interval": 0,
    "cyclic-cycles": 3,
    "cyclic-order": "random",
    "cyclic-train-stem": False,
    "freezeout-t0": 0.8,
    "freezeout-spacing": "cubic",
    "freezeout-scale-rates": True,
    "autofreeze-intervals": 10,
    "autofreeze-probes": 5,
    "autofreeze-percentile": 50.0,
    "grades-tau": 0.75,
    "grades-alpha": 0.3,
    "grades-probes": 50,
    "grow-blocks": "",
    "grow-until": "",
    "grow-when": "clock",
    "grow-window": 50,
    "grow-gain": 0.05,
    "grow-copy": "stack",
    "grow-then": "full_update",
    "payoff-relevance-metric": "grad_norm",
    "payoff-returns": 0.4,
    "payoff-outside": 0.5,
    "payoff-overhead": 0.05,
    "payoff-freeze-start-frac": 0.05,
    "payoff-ema-decay": 0.7,
    "row-active": 4,
    "row-rows": 0.25,
    "lora-rank": 8,
    "lora-alpha": 16.0,
    "lora-lr-factor": 5.0,
}
COMMAND = (  # the experiment's own style, every flag of it
    "--device cpu --dtype bfloat16 --seed 7 --dmodel 1024 --n-layers 18 --hidden-mult 4"
    " --batch-size 8 --seq-len 1024 --steps 1050 --equal-time-budget --max-steps-multiplier 3.0"
    " --lr 3e-4 --weight-decay 0 --teacher-noise 0.02 --val-batches 4 --warmup-ignore-steps 5"
    " --static-active-layers 6 --dyn-warmup-steps 40 --dyn-probe-every 24 --dyn-refresh-every 120"
    " --dyn-relevance-metric saliency_abs_gp --dyn-relevance-threshold 0.9"
    " --dyn-min-active-layers 12 --dyn-max-active-layers 15 --dyn-adapt-budget"
    " --dyn-freeze-start-step -1 --dyn-freeze-start-frac 0.35 --dyn-require-stable"
    " --dyn-stability-window 12 --dyn-stability-rel-change 0.02 --dyn-stability-cv 0.03"
    " --dyn-final-full-frac 0.12 --dyn-final-recovery-mode staged"
    " --dyn-final-recovery-stage1-progress 0.34 --dyn-final-recovery-stage2-progress 0.67"
    " --dyn-final-recovery-stage1-layers 14 --dyn-final-recovery-stage2-layers 16"
    " --dyn-loss-upper 1.03 --dyn-loss-lower 0.995 --dyn-budget-step-up 2"
    " --dyn-budget-step-down 1 --dyn-loss-ema-decay 0.9 --dyn-ema-decay 0.9 --dyn-eps 1e-8"
    " --json-out out.json"
)


def given(line: str) -> dict:
    return {k: v for k, v in vars(parser().parse_args(line.split())).items() if v is not None}


def test_the_flags_are_frozen():
    defaults = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(Config)}
    assert defaults == EXPERIMENT | OURS | OF_SCHEDULES
    options = {o for action in parser()._actions for o in action.option_strings}
    assert options >= {f"--{name}" for name in defaults}


def test_preset_seed_is_the_experiment():
    config = resolve(given("--preset seed --task teacher --device cpu"))
    for flag, value in (EXPERIMENT | {"device": "cpu"}).items():
        got = getattr(config, flag.replace("-", "_"))
        assert (got, type(got)) == (value, type(value)), flag


@pytest.mark.parametrize(
    "flag",
    ["equal-time-budget", "dyn-adapt-budget", "dyn-require-stable", "interleave"],
)
def test_switches_have_a_no(flag):
    key = flag.replace("-", "_")
    assert getattr(resolve(given(f"--preset seed --device cpu --{flag}")), key) is True
    assert getattr(resolve(given(f"--preset small --device cpu --no-{flag}")), key) is False


@pytest.mark.parametrize("line", ["--preset small --device cpu", "--device cpu"])
def test_small_is_the_cpu_default(line):
    config = resolve(given(line))
    for key, value in SMALL.items():
        assert getattr(config, key) == value, key
    assert config.equal_time_budget
    assert config.interleave
    assert config.steps >= 250
    assert config.val_batches >= 16
    assert (config.dmodel, config.n_layers, config.batch_size, config.seq_len) == (128, 8, 8, 128)
    assert "full_update#2" in config.names


@pytest.mark.parametrize("task", ["text", "finetune", "teacher"])
def test_preset_recommended_is_small_against_what_was_found(task):
    found = dataclasses.asdict(resolve(given(f"--preset recommended --task {task} --device cpu")))
    small = dataclasses.asdict(resolve(given(f"--preset small --task {task} --device cpu")))
    changed = {key for key, value in found.items() if value != small[key]} - {"preset"}
    told = RECOMMENDED.get(task, {"schedules": "full_update"})
    assert changed <= set(told)
    assert all(found[key] == value for key, value in told.items())
    assert found["schedules"].split(",")[0] == "full_update"


def test_of_a_size_that_was_not_tried_nothing_is_recommended():
    flags = preset_flags("recommended", "text", small=False)
    assert flags == {"schedules": "full_update"}


def test_flags_on_the_line_beat_the_preset():
    line = "--device cpu --steps 7 --dmodel 32 --lr 1 --no-interleave --schedules full_update"
    config = resolve(given(line))
    assert (config.steps, config.dmodel, config.lr) == (7, 32, 1.0)
    assert config.interleave is False
    assert config.names == ["full_update"]
    assert config.n_layers == SMALL["n_layers"]


@pytest.mark.parametrize(
    ("line", "decay"),
    [
        ("--task text", "linear"),
        ("", "linear"),
        ("--task teacher", "constant"),
        ("--task text --lr-decay constant", "constant"),
        ("--task teacher --lr-decay linear", "linear"),
    ],
)
def test_learning_rate_decay_by_task(line, decay):
    assert resolve(given(f"--device cpu {line}")).lr_decay == decay


def test_equal_time_without_full_update():
    line = "--device cpu --preset seed --equal-time-budget --schedules static_suffix"
    with pytest.raises(UserError, match="--time-budget-ms"):
        resolve(given(line))
    config = resolve(given(line + " --time-budget-ms 50"))
    assert config.time_budget_ms == 50.0
    assert config.budget_known
    assert not resolve(given("--device cpu --preset seed --equal-time-budget")).budget_known


def test_the_experiments_command_line():
    flags = given(COMMAND)
    assert set(flags) == {name.replace("-", "_") for name in EXPERIMENT}
    config = resolve(flags | {"task": "teacher", "preset": "seed"})
    assert config.equal_time_budget
    assert config.dyn_final_recovery_mode == "staged"
    assert config.dyn_relevance_metric == "saliency_abs_gp"
    assert config.limit == 3150
    assert from_experiment(list(flags))
    assert not from_experiment(["data", "schedules", "seed", "device", "out", "interleave"])
