"""The verdict, the figures and the table, on results made by hand."""

import copy

import pytest

from bench.config import Config
from bench.results import quantile, time_to_loss_ms
from bench.table import table
from bench.verdict import verdict

CONFIG = {
    "n_layers": 8, "accept_loss": 0.01, "equal_time_budget": True, "dyn_min_active_layers": 4,
    "dyn_max_active_layers": 6, "dyn_relevance_threshold": 0.9, "dyn_probe_every": 20,
    "dyn_freeze_start_frac": 0.1,
}  # fmt: skip
FLAT = [1.0] * 8


NAN, INF = float("nan"), float("inf")


def row(name: str, loss: float | None, speed: float, reached: float | None = 50.0) -> dict:
    return {
        "schedule": name, "final_val_loss": loss, "speedup_vs_full": speed, "elapsed_ms": 100.0,
        "time_to_full_loss_ms": reached, "mean_step_ms": 10.0 / speed, "steps_executed": 10,
        "active_layers_mean": 5.0, "active_layers_min": 4, "active_layers_max": 8,
        "probe_step_count": 3, "peak_bytes": 3 * 2**20, "measured_over_expected": 1.0,
        "speedup_kernels": None, "speedup_schedule": None, "gradient_bytes_per_step": None,
        "failure": None, "skipped_steps": 0,
    }  # fmt: skip


def probe(after: int, budget: int, scores: list[float], freezing: bool = True) -> dict:
    return {
        "probe": True, "active_layers_next": after, "active_budget": budget,
        "ema_scores": scores, "freeze_enabled": freezing,
    }  # fmt: skip


def result(loss=2.0, speed=1.3, active=(8, 5, 5, 5), probes=(), **config) -> dict:
    trace = {"active_layers_hist": list(active), "dynamic_trace": list(probes)}
    rows = [row("full_update", 2.0, 1.0), row("dynamic_suffix", loss, speed)]
    return {"config": CONFIG | config, "results": rows, "traces": {"dynamic_suffix": trace}}


def said(made: dict) -> str:
    return "\n".join(verdict(made))


def test_keep():
    text = said(result())
    assert text.startswith("Keep dynamic_suffix")
    assert "indication" in text
    assert "1.30x" in text
    assert "equal time" in text
    assert "50%" in text
    assert "--dyn" not in text
    assert "equal steps" in said(result(equal_time_budget=False))


@pytest.mark.parametrize(
    ("loss", "speed", "keep"),
    [
        (2.0, 1.05, True), (2.0, 1.049, False), (2.019, 1.3, True), (2.021, 1.3, False),
        (1.5, 1.3, True), (1.5, 1.0, False),
    ],
)  # fmt: skip
def test_the_borders(loss, speed, keep):
    made = result(loss, speed, probes=[probe(5, 6, FLAT)])
    assert said(made).startswith("Keep") == keep
    assert said(made).startswith("Do not keep") != keep
    made["config"]["accept_loss"] = 0.5
    assert said(made).startswith("Keep") == (speed >= 1.05)


def test_what_is_accepted_is_no_gain():
    costs = "Keep dynamic_suffix if the loss it costs is accepted: in equal time full_update ends"
    assert said(result(2.001)).startswith(costs)
    for made in (result(2.0), result(1.9), result(2.001, equal_time_budget=False)):
        assert said(made).startswith("Keep dynamic_suffix (an indication: one seed).")


def test_too_slow():
    text = said(result(speed=1.01, probes=[probe(5, 6, FLAT)]))
    assert "not clearly faster" in text
    assert "speed falls short" in text
    assert "--dyn-max-active-layers 6 -> 5" in text
    assert "quality" not in text


@pytest.mark.parametrize(
    ("active", "probes", "moves"),
    [
        ((8, 4, 4, 4), [probe(4, 6, FLAT)], ["min-active-layers 4 -> 5", "threshold 0.9 -> 0.95"]),
        ((8, 6, 6, 6), [probe(6, 6, FLAT)], ["max-active-layers 6 -> 7"]),
        ((8, 5, 5, 5), [probe(5, 6, FLAT)], ["threshold 0.9 -> 0.95"]),
        (
            (8, 6, 6, 6),
            [probe(6, 6, FLAT), probe(6, 6, [8.0] + [0.0] * 7)],
            ["max-active-layers 6 -> 7", "probe-every 20 -> 10"],
        ),
        (
            (8, 6, 6, 6),
            [probe(6, 6, FLAT, False), probe(6, 6, [8.0] + [0.0] * 7)],
            ["max-active-layers 6 -> 7"],
        ),
    ],
)
def test_quality_falls_short(active, probes, moves):
    lines = verdict(result(3.0, active=active, probes=probes))
    at = lines.index("The quality falls short. To move:")
    advice = lines[at + 1 :]
    assert len(advice) == len(moves)
    for line, move in zip(advice, moves, strict=True):
        assert f"--dyn-{move}" in line or f"--dyn-relevance-{move}" in line


def test_nothing_left_to_move_but_the_start_of_freezing():
    text = said(result(3.0, active=(8, 7), probes=[probe(8, 8, FLAT)], dyn_max_active_layers=0))
    assert "--dyn-freeze-start-frac 0.1 -> 0.55" in text


def test_freezing_never_started():
    assert "no block was ever frozen" in said(result(3.0, active=(8, 8)))
    text = said(result(2.0, 1.0, active=(8, 8)))
    assert "--dyn-freeze-start-frac" in text
    assert "no block was frozen" in text


def test_frozen_without_any_probe():
    assert "quality falls short" in said(result(3.0))


@pytest.mark.parametrize("loss", [None, NAN, INF])
@pytest.mark.parametrize("which", [0, 1])
def test_no_verdict_without_both_losses(loss, which):
    made = result()
    made["results"][which]["final_val_loss"] = loss
    assert said(made).startswith("No verdict")


def test_a_full_loss_of_zero():
    made = result(0.0)
    made["results"][0]["final_val_loss"] = 0.0
    assert verdict(made)


@pytest.mark.parametrize("which", [0, 1])
def test_no_verdict_without_both_schedules(which):
    made = result()
    del made["results"][which]
    assert said(made).startswith("No verdict")


@pytest.mark.parametrize(("loss", "within"), [(2.01, True), (1.99, True), (2.05, False)])
def test_the_noise_line(loss, within):
    made = result(loss, accept_loss=0.5)
    assert "twice" not in said(made)
    made["results"].append(row("full_update#2", 2.04, 0.97))
    text = said(made)
    assert "2.00% in loss" in text
    assert "3.0% in step time" in text
    assert ("within it" in text) == within


def test_reached_at_a_time_that_the_file_lacks():
    made = result(loss=1.9)
    made["results"][1]["time_to_full_loss_ms"] = None
    assert "when it got there was not recorded" in said(made)


def test_never_reached():
    made = result(loss=2.01)
    made["results"][1]["time_to_full_loss_ms"] = None
    assert "never reached" in said(made)


def test_another_schedule_with_the_lowest_loss_is_named_at_equal_time():
    made = result()
    made["results"].append(row("static_suffix", 1.8, 1.5))
    assert "lowest loss is static_suffix's: 10.00% below" in said(made)
    made["results"][-1]["final_val_loss"] = NAN
    assert "lowest loss" not in said(made)
    made["results"][-1]["final_val_loss"] = 2.2
    assert "lowest loss" not in said(made)
    steps = result(equal_time_budget=False)
    steps["results"].append(row("static_suffix", 1.8, 1.5))
    assert "lowest loss" not in said(steps)


def test_advice_names_real_flags():
    fields = {f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__}
    for made in (result(3.0, probes=[probe(4, 6, FLAT)]), result(2.0, 1.0), result(3.0, 1.0)):
        if not made["traces"]["dynamic_suffix"]["dynamic_trace"]:
            made["traces"]["dynamic_suffix"]["active_layers_hist"] = [8, 8]
        words = [word.strip(",;:()") for word in said(made).split()]
        assert {word for word in words if word.startswith("--")} <= fields


def vals(*pairs):
    return [{"step": i, "elapsed_ms": ms, "val_loss": v} for i, (ms, v) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("trace", "target", "at"),
    [
        (vals((0.0, 4.0), (10.0, 2.0)), 3.0, 5.0),
        (vals((0.0, 4.0), (10.0, 2.0)), 2.0, 10.0),
        (vals((0.0, 4.0), (10.0, 3.0), (20.0, 1.0), (30.0, 4.0), (40.0, 1.0)), 2.0, 15.0),
        (vals((0.0, 4.0), (10.0, 2.0)), 1.9, None),
        (vals((0.0, 2.0), (10.0, 3.0)), 2.5, 0.0),
        (vals((0.0, 4.0)), 1.0, None),
        ([], 1.0, None),
    ],
)
def test_time_to_loss(trace, target, at):
    assert time_to_loss_ms(trace, target) == at


def test_quantile_is_the_experiments():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert quantile(values, 0.5) == 3.0  # round(2.5) is 2 in Python
    assert quantile(values, 0.9) == 5.0
    assert (quantile(values, 0.0), quantile(values, 1.0), quantile([7.0], 0.9)) == (1.0, 6.0, 7.0)
    assert values[0] == 5.0


def test_the_table():
    rows = copy.deepcopy(result()["results"])
    rows.append(row("a_schedule_with_a_long_name", None, 1.0) | {"measured_over_expected": None})
    rows[-1]["speedup_vs_full"] = None
    lines = table(rows, on_cpu=True)
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert "5.0 (4-8)" in lines[1]
    assert "1.30x" in lines[2]
    assert lines[3].split() == [
        "a_schedule_with_a_long_name", "-", "10.0", "-", "10", "5.0", "(4-8)", "3", "3", "MiB", "-"
    ]  # fmt: skip
    assert "bwd" in lines[0]
    assert "peak memory" in table(rows, on_cpu=False)[0]
    assert "kernels" not in lines[0]


def on_kernels(loss: float, rival_loss: float = 2.0) -> dict:
    """A run with full_update, the same 1.2x as fast on the kernels, and dynamic_suffix 1.5x."""
    made = result(loss, 1.5)
    rival = row("full_update+fused", rival_loss, 1.2)
    rival |= {"speedup_kernels": 1.2, "speedup_schedule": 1.0}
    made["results"][1] |= {"speedup_kernels": 1.2, "speedup_schedule": 1.25}
    made["results"].insert(1, rival)
    return made


def test_the_schedule_is_judged_on_its_own_kernels():
    text = said(on_kernels(1.99, rival_loss=1.9))
    assert text.startswith("Do not keep")
    assert "A step is 1.25x as fast as full_update+fused's" in text
    assert "4.74% higher" in text
    assert "With its kernels it is 1.50x as fast as eager full_update" in text
    assert "(1.20 kernels x 1.25 schedule), its loss 0.50% lower." in text
    assert "50% of full_update+fused's time" in text
    alone = on_kernels(2.0)
    alone["results"][2] |= {"speedup_schedule": 1.04, "speedup_vs_full": 1.248}
    assert "not clearly faster" in said(alone)


def test_the_table_splits_the_gain():
    lines = table(on_kernels(2.0)["results"], on_cpu=True)
    assert "kernels x schedule" in lines[0]
    assert [line.count("1.20 x") for line in lines] == [0, 0, 1, 1]
    assert "1.20 x 1.25" in lines[3]
    assert len({len(line) for line in lines}) == 1


def beside(**losses: float | None) -> dict:
    """full_update ends at 2.0, each of the others as given, with steps of 1.5x its speed."""
    rows = [row(name, loss, 1.5) for name, loss in losses.items()]
    return {"config": CONFIG, "results": [row("full_update", 2.0, 1.0), *rows], "traces": {}}


def test_schedules_without_dynamic_suffix():
    lines = verdict(beside(lisa=2.1, grow=1.9))
    assert lines[0].startswith("grow ends 5.00% below full_update after equal time")
    assert lines[1:] == [
        "lisa: a step 1.50x as fast as full_update's, loss 5.00% higher.",
        "grow: a step 1.50x as fast as full_update's, loss 5.00% lower.",
    ]
    assert said(beside(lisa=2.0, cyclic=None)).startswith("Nothing beat full_update after equal ti")
    assert said(beside(lisa=None)).startswith("No verdict")
    assert said(beside()).startswith("No verdict: it compares schedules with full_update")


def test_they_are_compared_on_the_same_kernels():
    made = beside(grow=1.9)
    made["results"][1]["speedup_schedule"] = 1.25
    made["results"].append(row("full_update+fused", 1.8, 1.2))
    assert verdict(made)[:2] == [
        "Nothing beat full_update+fused after equal time (an indication: one seed).",
        "grow: a step 1.25x as fast as full_update+fused's, loss 5.56% higher.",
    ]


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (2.02, "Suffixes of such sizes in random order end 1.00% higher."),
        (1.98, "Suffixes of such sizes in random order end 1.00% lower: what was measured bought "),
        (None, None),
    ],
)
def test_the_control(loss, line):
    made = result()
    made["results"].append(row("random_suffix", loss, 1.3))
    assert (line or "Suffixes") in said(made) or line is None
    assert ("Suffixes" in said(made)) == (line is not None)


def test_what_is_better_than_the_experiments_schedules_comes_first():
    made = result()
    made["results"].append(row("static_suffix", 1.9, 1.5))
    assert verdict(made)[0].startswith("Keep dynamic_suffix")
    made["results"].append(row("grow", 1.8, 1.5))
    assert verdict(made)[0].startswith("The lowest loss is grow's: 10.00% below full_update's")
    assert verdict(made)[1].startswith("Keep dynamic_suffix")
