"""The flags that presets of the benchmark set."""

from typing import Any

# What a 2-core CPU trains in a few minutes.
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "dmodel": 128,
    "n_layers": 8,
    "seq_len": 128,
    "steps": 250,
    "equal_time_budget": True,
    "interleave": True,
    "lr": 2e-3,
    "val_batches": 16,
    "schedules": "full_update,full_update#2,static_suffix,dynamic_suffix,grow",
    "pretrain_steps": 600,
    "pretrain_lr": 2e-3,
    "static_active_layers": 4,
    "dyn_warmup_steps": 10,
    "dyn_probe_every": 20,
    "dyn_refresh_every": 0,
    "dyn_freeze_start_frac": 0.1,
    "dyn_min_active_layers": 3,
    "dyn_max_active_layers": 5,
    "dyn_final_full_frac": 0.1,
    "cyclic_train_stem": True,  # which begins untrained
}

# What preset small changes for task finetune. Not the learning rate, since so short a pretraining
# leaves much to learn: full_update ends 120 steps at 1.778 with 5e-4, 1.696 with 1e-3 and 1.660
# with 2e-3.
FINETUNE: dict[str, Any] = {
    "steps": 120,
    "schedules": "full_update,full_update#2,static_suffix,dynamic_suffix",
    "cyclic_train_stem": False,
    "payoff_freeze_start_frac": 0.0,
}

# What docs/results.md recommends, by task, at the size that it was found at. The learning rate is
# one that serves the full update within 1 % too; in fine-tuning the suffix bears twice as much.
RECOMMENDED: dict[str, dict[str, Any]] = {
    "text": {
        "schedules": "full_update,grow",
        "lr": 3e-3,
        "grow_blocks": "2",
        "grow_until": "0.85",
        "grow_copy": "none",
    },
    "finetune": {
        "schedules": "full_update,static_suffix",
        "lr": 3e-3,
        "static_active_layers": 2,
    },
}


def preset_flags(preset: str, task: str, small: bool) -> dict[str, Any]:
    """The flags that a preset sets; `small`: where it goes by the machine, that of a CPU."""
    if preset == "seed" or (preset == "auto" and not small):
        return {}
    if preset == "recommended" and not small:
        return {"schedules": "full_update"}  # of that size nothing is known
    flags = SMALL | (FINETUNE if task == "finetune" else {})
    if preset == "recommended":
        flags |= RECOMMENDED.get(task, {"schedules": "full_update"})
    return flags
