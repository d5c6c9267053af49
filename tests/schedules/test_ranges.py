"""Every range that DynamicSuffix and StaticSuffix keep, with the rule, the value and the remedy."""

import math
import re
import reprlib

import pytest

from blocksched.schedules import DynamicSuffix, StaticSuffix

REMEDY = "give a value in that range"
RANGES = [
    ("warmup_steps", -1, ">= 0"),
    ("probe_every", -1, ">= 0"),
    ("refresh_every", -1, ">= 0"),
    ("relevance_threshold", 0.0, "> 0 and <= 1"),
    ("relevance_threshold", -0.1, "> 0 and <= 1"),
    ("relevance_threshold", 1.0001, "> 0 and <= 1"),
    ("min_active", 0, ">= 1"),
    ("max_active", -1, ">= 0"),
    ("freeze_start_frac", -0.1, ">= 0 and <= 1"),
    ("freeze_start_frac", 1.1, ">= 0 and <= 1"),
    ("stability_window", 0, ">= 1"),
    ("stability_rel_change", -1e-9, ">= 0"),
    ("stability_cv", -1e-9, ">= 0"),
    ("final_full_frac", -0.1, ">= 0 and <= 1"),
    ("final_full_frac", 1.1, ">= 0 and <= 1"),
    ("final_recovery_stage1_progress", -0.1, ">= 0 and <= 1"),
    ("final_recovery_stage1_progress", 1.1, ">= 0 and <= 1"),
    ("final_recovery_stage2_progress", -0.1, ">= 0 and <= 1"),
    ("final_recovery_stage2_progress", 1.1, ">= 0 and <= 1"),
    ("final_recovery_stage1", 0, ">= 1"),
    ("final_recovery_stage2", 0, ">= 1"),
    ("loss_upper", -0.1, ">= 0"),
    ("loss_lower", -0.1, ">= 0"),
    ("budget_step_up", 0, ">= 1"),
    ("budget_step_down", 0, ">= 1"),
    ("loss_ema_decay", 1.0, ">= 0 and < 1"),
    ("loss_ema_decay", -0.1, ">= 0 and < 1"),
    ("ema_decay", 1.0, ">= 0 and < 1"),
    ("ema_decay", -0.1, ">= 0 and < 1"),
    ("eps", -1e-9, ">= 0"),
    ("relevance_metric", "grad", "one of grad_ratio, saliency_abs_gp"),
    ("final_recovery_mode", "half", "one of full, staged"),
    ("relevance_metric", None, "one of grad_ratio, saliency_abs_gp"),
    ("adapt_budget", 1, "true or false"),
    ("require_stable", None, "true or false"),
    ("warmup_steps", 1.0, "a whole number"),
    ("min_active", True, "a whole number"),
    ("max_active", "3", "a whole number"),
    ("freeze_start_step", 0.5, "a whole number"),
    ("freeze_start_step", None, "a whole number"),
    ("relevance_threshold", math.nan, "a finite number"),
    ("ema_decay", None, "a finite number"),
    ("loss_upper", math.inf, "a finite number"),
    ("loss_lower", math.nan, "a finite number"),
    ("eps", "0", "a finite number"),
    ("loss_ema_decay", math.nan, "a finite number"),
    ("loss_upper", 2**1024 - 1, "a finite number"),
    ("stability_window", 2**53 + 1, "at most 2**53 in size"),
    ("freeze_start_step", -(2**53) - 1, "at most 2**53 in size"),
]


@pytest.mark.parametrize(("field", "value", "rule"), RANGES)
def test_out_of_range(field, value, rule):
    start = re.escape(f"{field} must be {rule}, got {reprlib.repr(value)}: ")
    with pytest.raises(ValueError, match=f"^{start}({REMEDY}|choose one of these)$"):
        DynamicSuffix(**{field: value})


@pytest.mark.parametrize(
    "numbers",
    [
        {"warmup_steps": 0, "probe_every": 0, "refresh_every": 0, "max_active": 0, "eps": 0.0},
        {"relevance_threshold": 1.0, "freeze_start_frac": 1, "final_full_frac": 1.0},
        {"relevance_threshold": 1e-9, "freeze_start_frac": 0, "ema_decay": 0, "eps": 0},
        {"stability_window": 1, "stability_rel_change": 0.0, "stability_cv": 0.0},
        {"loss_ema_decay": None, "loss_lower": 1.0, "loss_upper": 1.0, "freeze_start_step": -9},
        {"min_active": 3, "max_active": 3, "budget_step_up": 1, "budget_step_down": 1},
        {"final_recovery_stage1_progress": 1.0, "final_recovery_stage2_progress": 0.0},
    ],
)
def test_the_limits_themselves_are_allowed(numbers):
    assert DynamicSuffix(**numbers) == DynamicSuffix(**numbers)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"loss_lower": 1.04},
            "loss_lower must not exceed loss_upper, got 1.04 > 1.03: lower the first or raise",
        ),
        (
            {"max_active": 3},
            "max_active must be 0 or at least min_active, got 3 < 4: raise max_active or lower",
        ),
    ],
)
def test_numbers_that_do_not_fit_each_other(numbers, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DynamicSuffix(**numbers)


STAGED = {"final_full_frac": 0.1, "final_recovery_mode": "staged"}
STAGED |= {"final_recovery_stage1": 5, "final_recovery_stage2": 6}


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ({"min_active": 9}, "min_active must be 1..8, got 9: "),
        ({"max_active": 9}, "max_active must be 0..8, got 9: "),
        ({**STAGED, "final_recovery_stage1": 3}, "final_recovery_stage1 must be 4..8, got 3: "),
        ({**STAGED, "final_recovery_stage1": 9}, "final_recovery_stage1 must be 4..8, got 9: "),
        ({**STAGED, "final_recovery_stage2": 4}, "final_recovery_stage2 must be 5..8, got 4: "),
        ({**STAGED, "final_recovery_stage2": 9}, "final_recovery_stage2 must be 5..8, got 9: "),
        (
            {**STAGED, "final_recovery_stage2_progress": 0.2},
            "final_recovery_stage2_progress must be at least final_recovery_stage1_progress "
            "(0.34), got 0.2: raise it",
        ),
    ],
)
def test_numbers_that_do_not_fit_the_model(numbers, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        DynamicSuffix(**numbers).init(8)


@pytest.mark.parametrize("off", [{"final_full_frac": 0.0}, {"final_recovery_mode": "full"}])
def test_stages_do_not_matter_without_a_staged_recovery(off):
    odd = {"final_recovery_stage1": 99, "final_recovery_stage2_progress": 0.0}
    assert DynamicSuffix(**(STAGED | odd | off)).init(8).n_blocks == 8


@pytest.mark.parametrize(("n", "first"), [(4, (4, 4)), (18, (18, 18))])
def test_the_start(n, first):
    state = DynamicSuffix().init(n)
    assert (state.active, state.budget) == first
    assert (state.relevance_ema, state.loss_ema, state.freezing) == ((0.0,) * n, None, False)
    capped = DynamicSuffix(max_active=4).init(n)
    assert (capped.active, capped.budget) == (4, 4)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (0, "active must be >= 1, got 0: give"),
        (2.0, "active must be a whole number, got 2.0: give"),
    ],
)
def test_static_suffix(active, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        StaticSuffix(active=active)
    with pytest.raises(ValueError, match=re.escape("active must be 1..5, got 6: lower it or")):
        StaticSuffix().init(5)
    assert StaticSuffix().init(6).n_blocks == 6
