"""Steps whose loss or gradients are not finite are left out, and too many of them end an arm."""

import contextlib
import io
import json
import math
from unittest import mock

import pytest

import bench.runner
from bench.run import main
from bench.tasks.text import TextTask
from bench.train import Arm
from bench.verdict import faults

STEPS = (
    "--preset seed --dtype float32 --lr 0.01 --dyn-freeze-start-frac 0 --dyn-warmup-steps 2"
    " --dyn-probe-every 4 --schedules full_update,dynamic_suffix"
)


@contextlib.contextmanager
def poisoned(bad):
    """The training loss of step t of a schedule is NaN where bad(its name, t)."""
    step, losses = Arm._step, TextTask.loss

    def poisoned_step(self, asked):
        def loss(task, outputs, targets):
            value = losses(task, outputs, targets)
            return value * math.nan if bad(self.name, self.taken) else value

        with mock.patch.object(TextTask, "loss", loss):
            step(self, asked)

    with mock.patch.object(Arm, "_step", poisoned_step):
        yield


def go(tiny, path, *flags, bad=lambda *_: False):
    heard = io.StringIO()
    with poisoned(bad), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = main([*tiny, *STEPS.split(), "--json-out", str(path), *flags])
    return code, heard.getvalue(), json.loads(path.read_text())


def test_a_step_is_left_out(tiny, tmp_path):
    """The weights do not move in it, and all else goes on."""
    bad = {3, 4, 8}  # 4 and 8 are probes
    code, said, result = go(
        tiny, tmp_path / "r.json", bad=lambda name, t: name == "dynamic_suffix" and t in bad
    )
    assert code == 0
    full, dynamic = result["results"]
    assert (full["skipped_steps"], dynamic["skipped_steps"]) == (0, 3)
    assert full["failure"] is dynamic["failure"] is None
    losses = result["traces"]["dynamic_suffix"]["train_losses"]
    assert [t for t, loss in enumerate(losses) if loss is None] == sorted(bad)
    assert math.isfinite(dynamic["final_val_loss"])
    assert "dynamic_suffix left out the updates of 3 of 12 steps" in said
    assert "full_update left out" not in said
    assert main(["--replay", str(tmp_path / "r.json")]) == 0


def test_what_is_left_out_moves_no_weight(tiny, tmp_path):
    last = ["--steps", "12", "--lr-decay", "constant", "--schedules", "full_update"]
    _, _, one = go(tiny, tmp_path / "a.json", *last, bad=lambda _, t: t >= 7)
    last[1] = "7"
    _, _, two = go(tiny, tmp_path / "b.json", *last)
    assert one["results"][0]["weights_sha256"] == two["results"][0]["weights_sha256"] is not None
    assert one["results"][0]["skipped_steps"] == 5


@pytest.mark.parametrize("mode", ["--interleave", "--no-interleave"])
@pytest.mark.parametrize("failing", [0, 1])
def test_too_many_end_the_schedule_without_a_result(mode, failing, tiny, tmp_path):
    """A row says why and holds no number that could be taken for a result."""
    names = "full_update", "dynamic_suffix"
    code, said, result = go(
        tiny, tmp_path / "r.json", mode, "--max-skipped", "2",
        bad=lambda name, t: name == names[failing] and t >= 4,
    )  # fmt: skip
    assert code == 3
    rows = {row["schedule"]: row for row in result["results"]}
    row, other = rows[names[failing]], rows[names[1 - failing]]
    assert row["steps_executed"] == 7
    assert row["skipped_steps"] == 3
    assert "max_skipped is 2" in row["failure"]
    for key in (
        "final_val_loss", "mean_step_ms", "p50_step_ms", "p90_step_ms", "speedup_vs_full",
        "speedup_kernels", "speedup_schedule", "expected_step_ms", "measured_over_expected",
        "time_to_full_loss_ms", "train_loss_end", "weights_sha256",
    ):  # fmt: skip
        assert row[key] is None, key
    assert other["steps_executed"] == 12
    assert math.isfinite(other["final_val_loss"])
    assert (other["speedup_vs_full"] is None) == (failing == 0)
    assert f"{names[failing]} was stopped and has no result: " in said
    assert "No verdict" in said
    assert main(["--replay", str(tmp_path / "r.json")]) == 0


def from_3(name: str, step: int) -> bool:
    return name == "full_update" and step >= 3


def test_a_failed_full_update_leaves_no_budget(tiny, tmp_path):
    flags = ["--equal-time-budget", "--max-skipped", "0"]
    code, said, result = go(tiny, tmp_path / "r.json", *flags, bad=from_3)
    assert code == 3
    assert [row["schedule"] for row in result["results"]] == ["full_update"]
    assert "No verdict" in said


def test_a_failure_is_kept_by_resume(tiny, tmp_path):
    flags = ["--max-skipped", "1", "--resume", str(tmp_path / "kept")]
    _, _, first = go(tiny, tmp_path / "r.json", *flags, bad=from_3)
    code, _, again = go(tiny, tmp_path / "r.json", *flags)
    assert code == 3
    assert again["results"] == first["results"]


def test_nothing_is_said_of_sound_rows():
    rows = [{"schedule": "a", "failure": None, "skipped_steps": 0, "steps_executed": 3}]
    assert faults(rows) == []


@pytest.mark.parametrize("status", ["running", "complete"])
def test_a_full_disk_at_the_result_file(status, tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("what was there")
    write = bench.runner.write

    def full(where, content):
        if content["status"] == status:
            raise OSError(28, "No space left on device")
        write(where, content)

    monkeypatch.setattr(bench.runner, "write", full)
    assert main([*tiny, *STEPS.split(), "--json-out", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert "No space left" in error
    assert "status" in path.read_text() or status == "running"
