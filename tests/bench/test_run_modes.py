"""What schedules share, what a run says, and runs at the edges of the flags."""

import json

import pytest

from bench.run import main
from blocksched import extension

STEPS = ["--preset", "seed", "--dtype", "float32"]
EQUAL = [*STEPS, "--equal-time-budget"]
BOTH = ["--schedules", "full_update,dynamic_suffix"]


def result_of(argv, path):
    assert main([*argv, "--json-out", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("task", ["text", "teacher"])
def test_all_blocks_always_active_is_full_update(task, backend, tiny, tmp_path):
    if backend == "fused" and not extension.HAS_CPP:
        pytest.skip("the extension is not built")
    whole = "--dyn-min-active-layers 4 --dyn-max-active-layers 4 --dyn-relevance-threshold 1"
    extra = ["--task", task, "--backend", backend, *whole.split(), "--dyn-freeze-start-frac", "0"]
    traces = result_of([*tiny, *STEPS, *BOTH, *extra], tmp_path / "r.json")["traces"]
    assert traces["dynamic_suffix"]["active_layers_hist"] == [4] * 12
    assert traces["dynamic_suffix"]["train_losses"] == traces["full_update"]["train_losses"]
    assert len(set(traces["full_update"]["train_losses"])) == 12


def test_the_same_start_and_batches_for_all(tiny, tmp_path):
    extra = [*STEPS, "--schedules", "full_update,full_update#2,static_suffix,dynamic_suffix"]
    traces = result_of([*tiny, *extra], tmp_path / "r.json")["traces"]
    assert len({trace["train_losses"][0] for trace in traces.values()}) == 1
    assert len({trace["val_trace"][0]["val_loss"] for trace in traces.values()}) == 1
    assert traces["full_update"]["train_losses"] == traces["full_update#2"]["train_losses"]
    assert traces["static_suffix"]["train_losses"] != traces["full_update"]["train_losses"]
    assert traces["static_suffix"]["active_layers_hist"] == [2] * 12


def test_interleaving_changes_no_loss(tiny, tmp_path):
    argv = [*tiny, *STEPS]
    one = result_of(argv, tmp_path / "a.json")["traces"]
    two = result_of([*argv, "--interleave"], tmp_path / "b.json")["traces"]
    for name, trace in one.items():
        assert trace["train_losses"] == two[name]["train_losses"]
        assert trace["active_layers_hist"] == two[name]["active_layers_hist"]


def test_learning_rate_decays_to_nothing(tiny, tmp_path):
    argv = [*tiny, *STEPS, "--schedules", "full_update", "--steps", "9", "--lr", "0.01"]
    found = [
        result_of([*argv, "--lr-decay", decay], tmp_path / f"{decay}.json")["traces"]
        for decay in ("constant", "linear")
    ]
    constant, linear = (trace["full_update"]["train_losses"] for trace in found)
    assert constant[:2] == linear[:2]
    assert constant[2] != linear[2]


def test_a_new_file_below_out(tiny, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert main([*tiny, *STEPS, "--schedules", "full_update", "--out", str(out)]) == 0
    page, path = sorted(out.iterdir())
    assert (page.suffix, path.suffix) == (".html", ".json")
    assert {str(page), str(path)} < {*capsys.readouterr().out.split()}


@pytest.mark.parametrize(("extra", "said"), [([], True), (["--task", "text"], False)])
def test_the_experiments_flags_point_to_its_task(extra, said, tiny, tmp_path, capsys):
    argv = [*tiny, *STEPS, *extra, "--schedules", "full_update"]
    result_of(argv, tmp_path / "r.json")
    assert ("--task teacher" in capsys.readouterr().out) is said


@pytest.mark.parametrize(
    ("steps", "mode"),
    [
        (1, STEPS),
        (5, EQUAL),
        (5, [*STEPS, "--interleave"]),
        (5, [*EQUAL, "--interleave"]),
        (3, [*EQUAL, "--interleave"]),
    ],
)
def test_very_short_runs(steps, mode, tiny, tmp_path):
    result = result_of([*tiny, *mode, "--steps", str(steps)], tmp_path / "r.json")
    least = 5 if "--equal-time-budget" in mode and "--interleave" in mode else steps
    assert all(row["steps_executed"] >= least for row in result["results"])


def test_no_probe_at_all(tiny, tmp_path):
    none = "--dyn-warmup-steps 0 --dyn-probe-every 0 --dyn-refresh-every 0 --accept-loss 0"
    extra = [*none.split(), "--dyn-freeze-start-frac", "0", "--lr", "0.01"]
    result = result_of([*tiny, *STEPS, *BOTH, *extra], tmp_path / "r.json")
    row = result["results"][1]
    assert row["probe_step_count"] == 0
    assert row["active_layers_mean"] == 3.0
    assert main(["--replay", str(tmp_path / "r.json")]) == 0


def test_nothing_to_learn(tiny, tmp_path):
    argv = [*tiny, *STEPS, *BOTH, "--task", "teacher", "--teacher-noise", "0"]
    result = result_of(argv, tmp_path / "r.json")
    assert all(row["final_val_loss"] == 0 for row in result["results"])


def test_a_diverged_run_gives_no_verdict(tiny, tmp_path, capsys):
    argv = [*tiny, *STEPS, *BOTH, "--task", "teacher", "--lr", "1e30"]
    result = result_of(argv, tmp_path / "r.json")
    assert result["results"][0]["final_val_loss"] is None
    said = capsys.readouterr().out
    assert "No verdict" in said
    assert main(["--replay", str(tmp_path / "r.json")]) == 0


@pytest.mark.parametrize("has_cpp", [True, False])
def test_without_the_extension(has_cpp, tiny, tmp_path, capsys, monkeypatch):
    if has_cpp and not extension.HAS_CPP:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(extension, "HAS_CPP", has_cpp)
    monkeypatch.setattr(extension, "reason", "no compiler")
    argv = [*tiny, *STEPS, "--schedules", "static_suffix,full_update", "--backend"]
    result = result_of([*argv, "auto"], tmp_path / "r.json")
    names = [row["schedule"] for row in result["results"]]
    fused = ["full_update+fused"] if has_cpp else []
    assert names == ["static_suffix", "full_update", *fused]
    assert ("All in eager torch: no compiler" in capsys.readouterr().out) == (not has_cpp)
    assert main([*argv, "fused", "--json-out", str(tmp_path / "f.json")]) == (0 if has_cpp else 2)
    heard = capsys.readouterr().err
    assert ("--backend fused needs blocksched's extension" in heard) == (not has_cpp)


def test_the_kernels_change_speed_not_learning(tiny, tmp_path):
    """Eager and fused runs see the same batches and differ by rounding."""
    if not extension.HAS_CPP:
        pytest.skip("the extension is not built")
    extra = ["--schedules", "full_update", "--backend", "auto", "--lr", "0.01"]
    result = result_of([*tiny, *STEPS, *extra], tmp_path / "r.json")
    eager, fused = (trace["train_losses"] for trace in result["traces"].values())
    assert fused == pytest.approx(eager, rel=1e-4)
    eager_row, fused_row = result["results"]
    assert fused_row["peak_bytes"] < eager_row["peak_bytes"]  # it is another layer that ran
