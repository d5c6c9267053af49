"""The experiment's flags are clamped and said; the library's numbers raise."""

import dataclasses
import math

import pytest

from blocksched.schedules import DynamicSuffix, FullUpdate, StaticSuffix
from blocksched.schedules.flags import base_name, from_flags

DEFAULTS = {
    "warmup_steps": 40,
    "probe_every": 20,
    "refresh_every": 80,
    "relevance_metric": "grad_ratio",
    "relevance_threshold": 0.9,
    "min_active": 4,
    "max_active": 0,
    "adapt_budget": False,
    "freeze_start_step": -1,
    "freeze_start_frac": 0.5,
    "require_stable": False,
    "stability_window": 12,
    "stability_rel_change": 0.02,
    "stability_cv": 0.03,
    "final_full_frac": 0.0,
    "final_recovery_mode": "full",
    "final_recovery_stage1_progress": 0.34,
    "final_recovery_stage2_progress": 0.67,
    "final_recovery_stage1": 14,
    "final_recovery_stage2": 16,
    "loss_upper": 1.03,
    "loss_lower": 0.995,
    "budget_step_up": 2,
    "budget_step_down": 1,
    "loss_ema_decay": 0.9,
    "ema_decay": 0.9,
    "eps": 1e-8,
}


def test_fields_and_defaults():
    assert dataclasses.asdict(DynamicSuffix()) == DEFAULTS
    assert list(dataclasses.asdict(DynamicSuffix())) == list(DEFAULTS)
    assert dataclasses.asdict(StaticSuffix()) == {"active": 6}
    assert dataclasses.fields(FullUpdate()) == ()


def test_missing_flags_mean_what_older_recordings_did():
    schedule, warnings = from_flags("dynamic_suffix", {"n_layers": 18})
    old = {"freeze_start_frac": 0.0, "final_full_frac": 0.0, "loss_ema_decay": None}
    assert dataclasses.asdict(schedule) == DEFAULTS | old
    assert warnings == []


def test_every_flag_is_read():
    other = {
        "dyn_warmup_steps": 1, "dyn_probe_every": 2, "dyn_refresh_every": 3,
        "dyn_relevance_metric": "saliency_abs_gp", "dyn_relevance_threshold": 0.8,
        "dyn_min_active_layers": 5, "dyn_max_active_layers": 6, "dyn_adapt_budget": True,
        "dyn_freeze_start_step": 7, "dyn_freeze_start_frac": 0.25, "dyn_require_stable": True,
        "dyn_stability_window": 8, "dyn_stability_rel_change": 0.1, "dyn_stability_cv": 0.2,
        "dyn_final_full_frac": 0.125, "dyn_final_recovery_mode": "staged",
        "dyn_final_recovery_stage1_progress": 0.3, "dyn_final_recovery_stage2_progress": 0.6,
        "dyn_final_recovery_stage1_layers": 9, "dyn_final_recovery_stage2_layers": 10,
        "dyn_loss_upper": 1.5, "dyn_loss_lower": 0.5, "dyn_budget_step_up": 3,
        "dyn_budget_step_down": 4, "dyn_loss_ema_decay": 0.7, "dyn_ema_decay": 0.6,
        "dyn_eps": 1e-6,
    }  # fmt: skip
    schedule, warnings = from_flags("dynamic_suffix", {"n_layers": 18, **other})
    # asdict keeps the order of the fields, which is that of the flags.
    assert list(dataclasses.asdict(schedule).values()) == list(other.values())
    assert warnings == []


STAGED = {"dyn_final_full_frac": 0.1, "dyn_final_recovery_mode": "staged"}
FITS = {"dyn_final_recovery_stage1_layers": 6, "dyn_final_recovery_stage2_layers": 7}


@pytest.mark.parametrize(
    ("flag", "value", "field", "used"),
    [
        ("dyn_min_active_layers", 0, "min_active", 1),
        ("dyn_min_active_layers", -3, "min_active", 1),
        ("dyn_min_active_layers", 9, "min_active", 8),
        ("dyn_max_active_layers", 9, "max_active", 8),
        ("dyn_max_active_layers", 2, "max_active", 4),  # never below min_active
        ("dyn_max_active_layers", -1, "max_active", 4),
        ("dyn_final_recovery_stage1_progress", -0.5, "final_recovery_stage1_progress", 0.0),
        ("dyn_final_recovery_stage2_progress", 1.5, "final_recovery_stage2_progress", 1.0),
        ("dyn_final_recovery_stage2_progress", 0.2, "final_recovery_stage2_progress", 0.34),
        ("dyn_final_recovery_stage1_layers", 3, "final_recovery_stage1", 4),
        ("dyn_final_recovery_stage2_layers", 5, "final_recovery_stage2", 6),
        ("dyn_final_recovery_stage2_layers", 9, "final_recovery_stage2", 8),
    ],
)
@pytest.mark.parametrize("staged", [True, False])
def test_one_warning_for_each_clamp_that_matters(flag, value, field, used, staged):
    config = {"n_layers": 8, **FITS, **(STAGED if staged else {}), flag: value}
    if (flag, value) == ("dyn_min_active_layers", 9):
        config |= {"dyn_final_recovery_stage1_layers": 8, "dyn_final_recovery_stage2_layers": 8}
    schedule, warnings = from_flags("dynamic_suffix", config)
    assert getattr(schedule, field) == used
    schedule.init(8)
    if not staged and "recovery" in flag:
        assert warnings == []
        return
    (warning,) = warnings
    option = "--" + flag.replace("_", "-")
    assert warning.startswith(f"{option} {value} ")
    assert warning.endswith(f": {used} is used")


@pytest.mark.parametrize("off", [{"dyn_final_full_frac": 0.0}, {"dyn_final_recovery_mode": "full"}])
def test_one_clamp_may_follow_from_another(off):
    config = {"n_layers": 8, "dyn_min_active_layers": 20, "dyn_max_active_layers": 5, **STAGED}
    schedule, warnings = from_flags("dynamic_suffix", config)
    used = (schedule.min_active, schedule.max_active)
    assert (*used, schedule.final_recovery_stage1, schedule.final_recovery_stage2) == (8, 8, 8, 8)
    assert [w.split()[0] for w in warnings] == [
        "--dyn-min-active-layers",
        "--dyn-max-active-layers",
        "--dyn-final-recovery-stage1-layers",
        "--dyn-final-recovery-stage2-layers",
    ]
    assert len(from_flags("dynamic_suffix", config | off)[1]) == 2


def test_max_active_0_means_every_block_without_a_word():
    schedule, warnings = from_flags("dynamic_suffix", {"n_layers": 5, "dyn_max_active_layers": 0})
    assert (schedule.max_active, schedule.init(5).budget, warnings) == (0, 5, [])


@pytest.mark.parametrize(
    ("given", "used", "warns"), [(6, 6, 0), (1, 1, 0), (18, 18, 0), (0, 1, 1), (19, 18, 1)]
)
def test_static_active_layers(given, used, warns):
    config = {"n_layers": 18, "static_active_layers": given, "dyn_min_active_layers": 99}
    schedule, warnings = from_flags("static_suffix#2", config)
    assert (schedule, len(warnings)) == (StaticSuffix(active=used), warns)
    assert all(f"--static-active-layers {given} " in w and f": {used} is" in w for w in warnings)
    assert from_flags("full_update", config) == (FullUpdate(), [])
    assert from_flags("static_suffix", {"n_layers": 3})[0] == StaticSuffix(active=3)


def test_names():
    for name in ("full_update", "full_update#2", "full_update+fused", "full_update+fused#2"):
        assert base_name(name) == "full_update"
        assert from_flags(name, {"n_layers": 2}) == (FullUpdate(), [])
    for name in ("", "full", "full_updates", "#full_update"):
        with pytest.raises(ValueError, match=r"unknown schedule .*choose among full_update"):
            from_flags(name, {"n_layers": 2})


@pytest.mark.parametrize("value", ["4", None, True, math.nan, [4]])
@pytest.mark.parametrize("flag", ["dyn_min_active_layers", "dyn_final_recovery_stage1_progress"])
def test_a_flag_that_is_no_number_raises(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} must be a number, got"):
        from_flags("dynamic_suffix", {"n_layers": 8, flag: value})
