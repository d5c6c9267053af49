"""Whole runs, tiny, in every mode: what the result file holds and whether it replays."""

import collections
import contextlib
import io
import json
import statistics

import pytest

from bench.pages.evidence import load
from bench.phases import PARTS
from bench.results import parse, write
from bench.run import main
from blocksched.extension import HAS_CPP

STAGED = (
    "--dyn-warmup-steps 2 --dyn-probe-every 3 --dyn-refresh-every 5 --dyn-require-stable"
    " --dyn-stability-window 2 --dyn-stability-rel-change 0.5 --dyn-stability-cv 0.5"
    " --dyn-adapt-budget --dyn-loss-upper 1 --dyn-freeze-start-frac 0.1 --dyn-final-full-frac 0.5"
    " --dyn-final-recovery-mode staged --dyn-final-recovery-stage1-layers 2"
    " --dyn-final-recovery-stage2-layers 3 --dyn-relevance-metric saliency_abs_gp"
)
FROZEN = "--dyn-warmup-steps 2 --dyn-probe-every 4 --dyn-freeze-start-frac 0"
LONGER = "--max-steps-multiplier 2"
MODES = {
    "interleaved": f"--preset small {FROZEN} {LONGER}",
    "interleaved_staged": f"--preset small {STAGED}",
    "sequential": f"--preset seed --equal-time-budget {FROZEN} {LONGER}",
    "sequential_staged": f"--preset seed --equal-time-budget {STAGED}",
    "budget_given": f"--preset seed --equal-time-budget --time-budget-ms 100 {FROZEN}",
    "steps": f"--preset seed {FROZEN}",
    "steps_staged": f"--preset seed --interleave {STAGED}",
    "teacher": f"--preset seed --task teacher --dtype float32 --equal-time-budget {STAGED}",
    "teacher_bf16": f"--preset seed --task teacher --dtype bfloat16 {FROZEN}",
    "auto": f"--preset small --backend auto {FROZEN} {LONGER}",
    "auto_bf16": f"--preset seed --backend auto --dtype bfloat16 {FROZEN}",
    "fused": f"--preset seed --backend fused --equal-time-budget {FROZEN} {LONGER}",
}
RESULT = """
    schedule steps_executed elapsed_ms final_val_loss train_loss_start train_loss_end mean_step_ms
    p50_step_ms p90_step_ms speedup_vs_full active_layers_mean active_layers_min active_layers_max
    probe_step_count notes fused speedup_kernels speedup_schedule
"""
FUSED = "full_update+fused"
PROBE = """
    step probe freeze_enabled probe_loss best_probe_loss probe_loss_ema_prev probe_loss_ema
    active_budget active_start_next active_layers_next ema_scores
"""


def _not_json(name):
    raise AssertionError(f"{name} is not JSON")


def run(argv):
    """Exit status, what was printed and the strict JSON that was written."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = main(argv)
    path = argv[argv.index("--json-out") + 1]
    with open(path) as file:
        return code, heard.getvalue(), json.load(file, parse_constant=_not_json)


@pytest.fixture(scope="module", params=MODES)
def made(request, tiny, tmp_path_factory):
    if not HAS_CPP and request.param.startswith(("auto", "fused")):
        pytest.skip("the extension is not built")
    path = tmp_path_factory.mktemp("run") / "r.json"
    argv = [*tiny, "--json-out", str(path), *MODES[request.param].split()]
    code, said, result = run(argv)
    assert code == 0, said
    return request.param, path, said, result


def test_every_field_is_there(made, tiny):
    name, _, said, result = made
    flags = {a[2:].replace("-", "_") for a in tiny if a.startswith("--")} - {"device"}
    wanted = flags | {"device_arg", "resolved_device", "json_out", "dyn_eps", "lr", "lr_decay"}
    wanted |= {"dyn_final_recovery_stage1_layers", "dyn_max_active_layers", "equal_time_budget"}
    assert wanted <= set(result["config"])
    assert (result["config"]["device_arg"], result["config"]["resolved_device"]) == ("cpu", "cpu")
    fixed = result["config"].get("time_budget_ms")
    assert (fixed is not None) == (
        name.startswith(("interleaved", "budget_given")) or name == "auto"
    )
    assert result["status"] == "complete"
    assert result["script"]
    assert result["timestamp_utc"]
    assert set(result["system"]) >= {"cuda_available", "cuda_device_name", "torch_version"}
    names = [row["schedule"] for row in result["results"]]
    assert names == list(result["traces"])
    assert [n for n in names if n != FUSED] == result["config"]["schedules"].split(",")
    assert (FUSED in names) == name.startswith("auto")
    assert ("full_update#2" in names) == (name.startswith("interleaved") or name == "auto")
    assert all(name in said for name in names)
    assert ("corpus_sha256" in result["task"]) == (result["config"]["task"] == "text")
    for row in result["results"]:
        assert set(row) >= set(RESULT.split())


def test_figures_follow_from_the_traces(made):
    result = made[3]
    ignore = result["config"]["warmup_ignore_steps"]
    counted = {
        name: trace["step_times_ms"][ignore:] or trace["step_times_ms"]
        for name, trace in result["traces"].items()
    }
    for row in result["results"]:
        trace, times = result["traces"][row["schedule"]], counted[row["schedule"]]
        losses, active = trace["train_losses"], trace["active_layers_hist"]
        assert len(trace["step_times_ms"]) == len(losses) == len(active) == row["steps_executed"]
        assert row["mean_step_ms"] == pytest.approx(sum(times) / len(times))
        assert row["p50_step_ms"] == sorted(times)[round(0.5 * (len(times) - 1))]
        assert row["p90_step_ms"] == sorted(times)[round(0.9 * (len(times) - 1))]
        baseline = statistics.fmean(counted["full_update"])
        assert row["speedup_vs_full"] == pytest.approx(baseline / statistics.fmean(times))
        assert row["elapsed_ms"] == pytest.approx(sum(trace["step_times_ms"]))
        assert (row["train_loss_start"], row["train_loss_end"]) == (losses[0], losses[-1])
        assert row["active_layers_mean"] == pytest.approx(sum(active) / len(active))
        assert (row["active_layers_min"], row["active_layers_max"]) == (min(active), max(active))
        probes = [e for e in trace["dynamic_trace"] if e.get("probe")]
        assert row["probe_step_count"] == len(probes)
        assert row["final_val_loss"] == trace["val_trace"][-1]["val_loss"]
        assert trace["val_trace"][0]["step"] == 0
        assert trace["val_trace"][-1]["step"] == row["steps_executed"]


def test_where_the_time_of_steps_went(made):
    ignore = made[3]["config"]["warmup_ignore_steps"]
    for trace in made[3]["traces"].values():
        times = collections.defaultdict(list)
        pairs = list(zip(trace["active_layers_hist"], trace["step_times_ms"], strict=True))
        for active, ms in pairs[ignore:] or pairs:
            times[str(active)].append(ms)
        assert trace["parts_ms"].keys() == times.keys()
        for active, parts in trace["parts_ms"].items():
            assert parts.keys() == {"steps", *PARTS, "other"}
            assert parts["steps"] == len(times[active])
            spent = [parts[part] for part in (*PARTS, "other")]
            assert min(spent) > 0
            assert sum(spent) == pytest.approx(sum(times[active]))


def test_what_a_report_shows_is_there(made):
    _, path, _, result = made
    evidence = load(path)
    assert [*evidence.expected_ms] == [1, 2, 3, 4]
    assert min(evidence.expected_ms.values()) > 0
    assert result["command"].startswith("python bench/run.py --")
    assert {"commit", "cpu_name"} <= result["system"].keys()
    rows = {row["schedule"]: row for row in result["results"]}
    for run in evidence.runs:
        trace = result["traces"][run.name]
        active = trace["active_layers_hist"]
        changes = [step for step, k in enumerate(active) if step == 0 or k != active[step - 1]]
        if run.name == "grow":
            expected = [[t, [*range(active[t])]] for t in changes]
            assert trace["running_blocks"] == expected
        else:
            expected = [[t, [*range(4 - active[t], 4)]] for t in changes]
        assert trace["active_blocks"] == expected
        assert [(c.step, [*c.blocks]) for c in run.changes] == [
            (step, blocks) for step, blocks in trace["active_blocks"]
        ]
        assert [probe.step for probe in run.probes] == trace["probe_steps"]
        assert len(trace["probe_steps"]) == rows[run.name]["probe_step_count"]
        assert run.memory.keys() == run.parts_ms.keys() | {*active}
        assert max(run.memory.values()) == rows[run.name]["peak_bytes"]
        assert sorted(run.memory.values()) == [run.memory[k] for k in sorted(run.memory)]


def test_what_is_fused_and_how_gains_split(made):
    name, _, said, result = made
    rows = {row["schedule"]: row for row in result["results"]}
    for schedule, row in rows.items():
        eager = schedule.startswith("full_update") and schedule != FUSED
        assert row["fused"] == (name == "fused" or (name.startswith("auto") and not eager))
        if name.startswith("auto") and row["fused"]:
            both = row["speedup_kernels"] * row["speedup_schedule"]
            assert both == pytest.approx(row["speedup_vs_full"])
            assert row["speedup_kernels"] == rows[FUSED]["speedup_vs_full"]
        else:
            assert row["speedup_kernels"] is row["speedup_schedule"] is None
    assert ("kernels x schedule" in said) == name.startswith("auto")
    assert (f"as fast as {FUSED}'s" in said) == name.startswith("auto")
    assert ("With its kernels" in said) == name.startswith("auto")


def test_dynamic_trace(made):
    name, _, _, result = made
    for schedule, trace in result["traces"].items():
        if schedule != "dynamic_suffix":
            assert trace["dynamic_trace"] == []
            continue
        entries = trace["dynamic_trace"]
        probes = [e for e in entries if "probe" in e]
        assert probes[0]["step"] == 0
        assert probes[0]["probe_loss_ema_prev"] is None
        for probe in probes:
            assert set(probe) >= set(PROBE.split())
            assert probe["probe"] is True
            assert len(probe["ema_scores"]) == result["config"]["n_layers"]
            assert probe["probe_loss"] == trace["train_losses"][probe["step"]]
            assert probe["active_layers_next"] + probe["active_start_next"] == 4
            assert trace["active_layers_hist"][probe["step"]] == 4
        triggers = [e for e in entries if "freeze_trigger" in e]
        assert len(triggers) == 1
        assert set(triggers[0]["freeze_trigger"]) >= {"reached_start", "stable_ok"}
        stages = [e["final_recovery_stage"] for e in entries if "final_recovery_stage" in e]
        if "staged" in name or name == "teacher":
            assert stages
            assert stages == ["stage1", "stage2", "stage3_full"][-len(stages) :] or stages[0] == (
                "stage1"
            )
        timed = result["config"]["equal_time_budget"]  # a busy machine may give it few steps
        assert timed or min(trace["active_layers_hist"]) < 4


def test_budgets_are_obeyed(made):
    result = made[3]
    config, rows = result["config"], result["results"]
    if not config["equal_time_budget"]:
        assert all(row["steps_executed"] == config["steps"] for row in rows)
        return
    full = next(row for row in rows if row["schedule"] == "full_update")
    fixed = config.get("time_budget_ms")
    budget = full["elapsed_ms"] if fixed is None else fixed
    if fixed is None:
        assert full["steps_executed"] == config["steps"]
    limit = max(config["steps"], round(config["steps"] * config["max_steps_multiplier"]))
    for row in rows:
        steps, times = row["steps_executed"], result["traces"][row["schedule"]]["step_times_ms"]
        assert steps >= config["warmup_ignore_steps"]
        assert steps <= limit
        assert row["elapsed_ms"] >= budget or steps == limit
        assert sum(times[:-1]) < budget or steps == config["warmup_ignore_steps"]


def test_it_replays(made, capsys):
    _, path, _, result = made
    assert main(["--replay", str(path)]) == 0
    steps = sum(row["steps_executed"] for row in result["results"])
    assert capsys.readouterr().out == f"{path}: {steps} steps, 0 differences\n"
    spoilt = parse(path.read_bytes())
    spoilt["traces"]["static_suffix"]["active_layers_hist"][1] += 1
    other = path.with_name("spoilt.json")
    write(other, spoilt)
    assert main(["--replay", str(path), str(other)]) == 1
    said = capsys.readouterr().out
    assert f"{other}: {steps} steps, 1 differences" in said
    assert "static_suffix step 1" in said
    spoilt["traces"]["static_suffix"]["active_layers_hist"][1] -= 1
    spoilt["traces"]["dynamic_suffix"]["active_layers_hist"][-1] -= 1
    write(other, spoilt)
    assert main(["--replay", str(other)]) == 1
