"""Made-up runs of any schedule, recorded as bench/run.py records them."""

import json
import math

from blocksched.schedules import Progress, Reading, to_plain
from blocksched.schedules.flags import from_flags

N, STEPS = 6, 40
CONFIG = {
    "n_layers": N, "steps": STEPS, "random_counts": "10,0,10,0,0,20", "grow_blocks": "2,3",
    "grow_until": "0.2,0.4", "dyn_warmup_steps": 3, "dyn_probe_every": 4,
    "dyn_freeze_start_frac": 0.2, "dyn_final_full_frac": 0.1, "dyn_relevance_threshold": 0.7,
    "dyn_min_active_layers": 2, "row_active": 2, "autofreeze_intervals": 5, "autofreeze_probes": 2,
}  # fmt: skip


def measure(step, plan):
    """What a probe at `step` finds: 0 for what does not train."""
    values = [(1.1 + math.sin(step * 0.4 + b)) ** 4 for b in range(N)]
    return tuple(value if b in plan.active else 0.0 for b, value in enumerate(values))


def record(name, config=CONFIG, bad=()):
    """The trace of a run; what the probes at the steps in `bad` measured was not finite."""
    schedule, _ = from_flags(name, config)
    state, plans, readings = schedule.init(N), [], []
    for step in range(STEPS):
        plan = schedule.plan(state, Progress(step, config["steps"], 10.0 * step))
        found = Reading()
        if plan.probe:
            values = (math.nan,) * N if step in bad else measure(step, plan)
            times = ((1.0,) * N, (2.0,) * N) if schedule.timed else ()
            found = Reading(None, values, *times)
            readings.append({"step": step, **to_plain(found)})
            del readings[-1]["loss"]
        plans.append(plan)
        loss = 2.0 * 0.97**step
        reading = Reading(loss, found.relevance, found.forward_ms, found.backward_ms)
        state = schedule.observe(state, plan, reading)
    everything = tuple(range(N))
    running = [everything if plan.running is None else plan.running for plan in plans]
    return {
        "step_times_ms": [10.0] * STEPS,
        "train_losses": [2.0 * 0.97**step for step in range(STEPS)],
        "active_layers_hist": [len(plan.active) for plan in plans],
        "active_blocks": changes([plan.active for plan in plans]),
        "running_blocks": [] if set(running) == {everything} else changes(running),
        "readings": readings,
    }


def changes(sets):
    return [[i, list(s)] for i, s in enumerate(sets) if i == 0 or s != sets[i - 1]]


def on_disk(traces, config=CONFIG):
    """What a result file holds of them: null for what is not finite."""
    text = json.dumps({"config": config, "traces": traces})
    return json.loads(text, parse_constant=lambda _: None)
