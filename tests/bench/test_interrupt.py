"""Interruptions: a valid file marked so, which replays; a file is written whole or not at all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bench.runner
from bench.results import parse, write
from bench.run import main

ROOT = Path(__file__).resolve().parents[2]
EQUAL_LENGTHS = ("step_times_ms", "train_losses", "active_layers_hist")


def check_interrupted(path, capsys):
    result = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert result["status"] == "interrupted"
    for name, trace in result["traces"].items():
        assert len({len(trace[key]) for key in EQUAL_LENGTHS}) == 1, name
        times = trace["step_times_ms"]
        spent = sum(sum(parts.values()) - parts["steps"] for parts in trace["parts_ms"].values())
        assert spent == pytest.approx(sum(times[5:] or times)), name
    rows = {row["schedule"]: row for row in result["results"]}
    assert set(rows) == set(result["traces"])
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.stem}.html"}
    if result["traces"]:
        capsys.readouterr()
        code = main(["--replay", str(path)])
        assert code == 0, capsys.readouterr().out
    return result


@pytest.mark.parametrize(
    ("number", "code", "mode"),
    [(signal.SIGINT, 130, "small"), (signal.SIGTERM, 143, "seed")],
)
def test_signals(number, code, mode, tiny, tmp_path, capsys):
    path = tmp_path / "out" / "r.json"
    long = ["--preset", mode, "--dtype", "float32", "--steps", "400", "--json-out", str(path)]
    long += ["--dyn-warmup-steps", "1", "--dyn-probe-every", "0", "--dyn-refresh-every", "0"]
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "bench" / "run.py"), *tiny, *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=_heed_interrupts,
    )
    try:
        seen = 0
        for line in child.stdout:
            seen += " step " in line
            if seen == 6:  # by then every schedule of the small preset has moved
                break
        child.send_signal(number)
        _, said = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == code, said
    assert "Traceback" not in said
    assert str(path) in said
    result = check_interrupted(path, capsys)
    assert result["results"]
    assert all(row["final_val_loss"] is None for row in result["results"])


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background shell has it ignored


class Stopper:
    """Stands in for the live lines: stops the run at the given update."""

    def __init__(self, at: int) -> None:
        self.left = at

    def update(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize("probe_every", ["1", "20"])
def test_stopped_after_any_group_of_steps(at, probe_every, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.runner, "Live", lambda: Stopper(at))
    path = tmp_path / "out" / "r.json"
    names = "dynamic_suffix,full_update,static_suffix"
    flags = ["--preset", "small", "--no-equal-time-budget", "--schedules", names]
    flags += ["--dyn-probe-every", probe_every, "--json-out", str(path)]
    assert main([*tiny, *flags]) == 130
    check_interrupted(path, capsys)


def test_stopped_before_the_first_step(tiny, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise bench.runner.Terminated

    monkeypatch.setattr(bench.runner, "Expected", stop)
    path = tmp_path / "out" / "r.json"
    assert main([*tiny, "--preset", "small", "--json-out", str(path)]) == 143
    assert check_interrupted(path, capsys)["results"] == []


def test_the_handler_is_put_back(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.runner, "Live", lambda: Stopper(1))
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(Exception):
        main([*tiny, "--preset", "small", "--json-out", str(tmp_path / "r.json")])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write(path, {"a": 1})

    def fail(_handle):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            write(path, {"a": 2})
    assert parse(path.read_bytes()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    write(path, {"a": 3})
    assert parse(path.read_bytes()) == {"a": 3}


def test_what_cannot_be_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    write(path, {"a": 1})
    with pytest.raises(TypeError):
        write(path, {"a": object()})
    assert parse(path.read_bytes()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_not_finite_becomes_null(tmp_path):
    path = tmp_path / "r.json"
    nan, inf = float("nan"), float("inf")
    write(path, {"a": [nan, (inf, -inf)], "b": {3: nan}, "c": 1.5})
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert parse(path.read_bytes()) == {
        "a": [None, [None, None]],
        "b": {"3": None},
        "c": 1.5,
    }
