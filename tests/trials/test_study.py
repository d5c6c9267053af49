"""bench/study.py from end to end: verdicts that can tell, and nothing lost by being stopped."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench.study
import bench.train
import bench.trials.cells as cells
from bench.results import read
from bench.runner import Terminated
from bench.study import main
from bench.tasks.text import TextTask
from bench.train import Arm
from tests.trials.tiny import TWO, study_file, write_prices

STUDY = str(Path(__file__).resolve().parents[2] / "bench" / "study.py")
SHORT = {"steps": 6, "val_batches": 1}
CELLS = {f"text-{arm}-{seed}.json" for arm in TWO for seed in (1, 2)}


@pytest.fixture
def made(text_file, tmp_path):
    """A function: a study on the computed clock, its prices beside where its cells go."""

    def build(name="study", arms=TWO, top="", **flags):
        path = study_file(tmp_path / name, text_file, arms, top, **SHORT | flags)
        write_prices(path.parent / "out")
        return path

    return build


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory):
    """The result of a study that nothing stopped."""
    path = study_file(tmp_path_factory.mktemp("whole"), text_file, **SHORT)
    write_prices(path.parent / "out")
    assert main(line(path)) == 0
    return learned(path)


def line(path: Path) -> list[str]:
    return [str(path), "--out", str(path.parent / "out")]


def learned(path: Path) -> dict:
    result = read(path.parent / "out" / "study.json")
    assert result["status"] == "complete"
    return {key: value for key, value in result.items() if key not in ("timestamp_utc", "command")}


def files(path: Path) -> dict[str, tuple[bytes, int]]:
    """The cells that have ended, their content and when they were written."""
    found = [each for each in (path.parent / "out").iterdir() if each.name in CELLS]
    return {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in found}


def finish(path: Path, whole: dict, monkeypatch) -> None:
    """Go on: what has ended stays as it is and is not run, and the result is that of `whole`."""
    before, made = files(path), []

    class Counted(Arm):
        def __init__(self, *args, **named):
            made.append(args[0])
            super().__init__(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "Arm", Counted)
        assert main(line(path)) == 0
    assert files(path).items() >= before.items()
    assert len(made) == len(CELLS) - len(before)
    assert learned(path) == whole


@pytest.mark.parametrize(
    ("at", "error"),
    [(1, KeyboardInterrupt()), (4, Terminated()), (7, KeyboardInterrupt())],
    ids=str,
)
def test_stopped_at_any_step(at, error, made, whole, monkeypatch, capsys):
    path, count, advance = made(), itertools.count(1), Arm.advance

    def stopped(arm, steps):
        if next(count) == at:
            raise error
        return advance(arm, steps)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Arm, "advance", stopped)
        assert main(line(path)) == (143 if isinstance(error, Terminated) else 130)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Interrupted; the same command goes on." in capsys.readouterr().err
    assert len(files(path)) < len(CELLS)
    result = path.parent / "out" / "study.json"
    assert not result.exists() or read(result)["status"] == "incomplete"
    finish(path, whole, monkeypatch)


@pytest.mark.parametrize("at", [1, 4, 5, 6])  # four cells, the result, its page
def test_stopped_in_any_writing(at, made, whole, monkeypatch):
    path, count, fsync = made(), itertools.count(1), os.fsync

    def stopped(handle):
        if next(count) == at:
            raise KeyboardInterrupt
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopped)
        assert main(line(path)) == 130
    assert not list((path.parent / "out").glob("*.tmp"))
    finish(path, whole, monkeypatch)


def test_stopped_before_the_first_step(made, monkeypatch):
    def stopped(*_):
        raise Terminated

    monkeypatch.setattr(bench.study, "load", stopped)
    assert main(line(made())) == 143


def start(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, STUDY, *line(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=path.parent,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("number", "at", "code"),
    [
        (signal.SIGKILL, "(3 of", -9),
        (signal.SIGTERM, "(2 of", 143),
        *(
            pytest.param(number, f"({i} of", code, marks=pytest.mark.soak)
            for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130))
            for i in range(1, 5)
        ),
    ],
)
def test_a_signal(number, at, code, made, whole, monkeypatch):
    path = made()
    child = start(path)
    try:
        assert any(at in said for said in child.stdout)
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code, said
    assert "Traceback" not in said
    (path.parent / "out" / "text-top2-2.jsonx0.tmp").write_bytes(b"{")  # as a kill leaves it
    assert len(files(path)) < len(CELLS)
    finish(path, whole, monkeypatch)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_full_disk_is_a_line(at, made, whole, monkeypatch, capsys):
    path, count, fsync = made(), itertools.count(1), os.fsync

    def full(handle):
        if next(count) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(line(path)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "cannot be written (No space left on device): make room" in said
    assert len(files(path)) == at - 1
    finish(path, whole, monkeypatch)


def test_a_place_that_is_no_folder_is_a_line(made, capsys):
    path = made()
    (path.parent / "file").write_text("")
    for out in ("file", "file/below", "n" * 300):
        assert main([str(path), "--out", str(path.parent / out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: --out ")
        assert said.count("\n") == 1


def test_what_cannot_be_run_is_a_line(made, capsys):
    path = made(arms=TWO | {"top2": {"schedule": "a\nb"}})
    for given in (str(path), str(path.parent), str(path.parent / "a\nb.toml")):
        assert main([given, "--out", str(path.parent / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1


def test_a_confirmation_that_is_not_committed_does_not_run(made, capsys):
    seeds = f"seeds = {[*range(10, 20)]}\nnull = 'again'\nconfirms = ['../other/study.toml']"
    made("other")
    path = made(arms={"full_update": {}, "again": {"schedule": "full_update"}}, top=seeds)
    assert main(line(path)) == 2
    assert "committed" in capsys.readouterr().err
    assert not list((path.parent / "out").glob("text*"))


@pytest.fixture
def jittering(monkeypatch):
    """The machine's clock is replaced by one on which a training step takes 250 ms, give or take a
    few."""
    chance, now, loss = torch.Generator().manual_seed(3), [0.0], TextTask.loss

    def slow(task, outputs, targets):
        now[0] += 0.25 + 0.01 * float(torch.rand((), generator=chance))
        return loss(task, outputs, targets)

    monkeypatch.setattr(TextTask, "loss", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cells, "Expected", lambda *_: None)


@pytest.mark.usefixtures("jittering")
def test_the_verdict_can_tell(made, monkeypatch, capsys):
    """A confirmation on the measured clock: planted arms are found out, the null is none."""
    arms = {
        "full_update": {},
        "again": {"schedule": "full_update"},
        "slow": {"schedule": "full_update", "time_factor": 3},
        "fast": {"schedule": "full_update", "time_factor": 0.33},
    }
    top = f"seeds = {[*range(10, 20)]}\nclock = 'time'\nnull = 'again'\nmargin = 0.05\n"
    made("other")
    path = made(arms=arms, top=top + "confirms = ['../other/study.toml']", steps=10,
                n_layers=2, seq_len=8, warmup_ignore_steps=1)  # fmt: skip
    monkeypatch.setattr(bench.study, "_require_committed", lambda _: None)
    monkeypatch.setattr(bench.train, "EVALUATIONS", 2)
    assert main(line(path)) == 0
    result = read(path.parent / "out" / "study.json")
    assert result["status"] == "complete"
    assert (result["clock"], result["confirms"]) == ("time", ["study"])
    found = result["tasks"]["text"]["arms"]
    assert {name: arm["verdict"] for name, arm in found.items()} == {
        "full_update": None, "again": "NO_DIFFERENCE", "slow": "LOSS", "fast": "WIN",
    }  # fmt: skip
    assert found["fast"]["loss"]["high"] < 0 < found["slow"]["loss"]["low"]
    assert [len(arm["cells"]) for arm in found.values()] == [10] * 4
    assert found["fast"]["planted"] == 0.33
    assert (path.parent / "out" / "study.html").exists()
    assert "WIN" in capsys.readouterr().out
