"""kill -9 at random moments, SIGTERM, a rank that dies, a full disk: nothing is lost."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.run import main

RUN = str(Path(__file__).resolve().parents[2] / "bench" / "run.py")
MOVING = (
    "--preset seed --dtype float32 --lr 0.01 --schedules full_update,dynamic_suffix --interleave"
    " --dyn-warmup-steps 2 --dyn-probe-every 5 --dyn-freeze-start-frac 0.2"
    " --dyn-relevance-threshold 0.3 --dyn-final-full-frac 0.2 --steps 40"
)
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command: list[str], where: Path, limit_bytes: int | None = None) -> subprocess.Popen:
    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=where,
        preexec_fn=limit,
    )


def until(child: subprocess.Popen, word: str) -> bool:
    """Read on until it says `word`; whether it did."""
    return any(word in line for line in child.stdout)


@pytest.fixture
def command(tiny, tmp_path):
    """A function: a name, flags -> the arguments of a run whose result is NAME.json."""

    def made(name: str, *flags: str) -> list[str]:
        path = tmp_path / f"{name}.json"
        return [RUN, *tiny, *MOVING.split(), "--json-out", str(path), *flags]

    return made


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> list:
    """What a run that nothing stopped has learned."""
    path = tmp_path_factory.mktemp("whole") / "r.json"
    assert main([*tiny, *MOVING.split(), "--json-out", str(path)]) == 0
    return learned(path)


def learned(path: Path) -> list:
    result = json.loads(path.read_text())
    assert result["status"] == "complete"
    assert all(row["weights_sha256"] for row in result["results"])
    return [
        (row["weights_sha256"], row["final_val_loss"], *result["traces"][name]["train_losses"])
        for row in result["results"]
        for name in [row["schedule"]]
    ]


def finish(child: subprocess.Popen) -> str:
    try:
        said, _ = child.communicate(timeout=120)
    finally:
        child.terminate()  # a torchrun takes its processes along
    assert child.returncode == 0, said
    return said


def killed_and_resumed(kills: int, command, where: Path, seed: int, whole: list) -> None:
    """Kill a run at random moments of its training and writing, and start it again each time."""
    chance, done, turn = random.Random(seed), 0, 0
    while done < kills:
        turn += 1
        flags = ["--resume", str(where / f"kept{turn}"), "--checkpoint-every", "1"]
        while True:
            child = start(command(f"r{turn}", *flags), where)
            try:
                alive = done < kills and until(child, "loss")  # the first line of a step
                time.sleep(chance.uniform(0.0, 1.5) if alive else 0.0)
                if alive:
                    child.kill()
                said, _ = child.communicate(timeout=120)
            finally:
                child.kill()
            if child.returncode == 0:
                break
            assert child.returncode == -signal.SIGKILL, said
            done += 1
        assert learned(where / f"r{turn}.json") == whole
        assert not list((where / f"kept{turn}").glob("*.tmp"))


def test_killed_and_resumed(command, tmp_path, whole):
    killed_and_resumed(2, command, tmp_path, 1, whole)


@pytest.mark.soak
def test_killed_and_resumed_20_times(command, tmp_path, whole):
    killed_and_resumed(20, command, tmp_path, 2, whole)


def test_sigterm_keeps_the_step(command, tmp_path, whole):
    flags = ["--resume", str(tmp_path / "kept"), "--checkpoint-every", "100000"]
    child = start(command("r", *flags), tmp_path)
    assert until(child, "loss")
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 143, said
    assert "the same command goes on" in said
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "interrupted"
    assert "Going on from a checkpoint" in finish(start(command("r", *flags), tmp_path))
    assert learned(tmp_path / "r.json") == whole


def test_a_rank_that_is_killed_is_started_again(command, tmp_path):
    finish(start([*TWO, *command("whole")], tmp_path))
    flags = ["--resume", str(tmp_path / "kept"), "--checkpoint-every", "10"]
    child = start([*TWO, "--max-restarts", "1", *command("r", *flags)], tmp_path)
    kept = tmp_path / "kept" / "part-0"
    while not list(kept.glob("step-*")):
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.02)
    os.kill(last_child_of(child.pid), signal.SIGKILL)
    assert "Going on from a checkpoint" in finish(child)
    assert learned(tmp_path / "r.json") == learned(tmp_path / "whole.json")


def last_child_of(pid: int) -> int:
    """The process of rank 1, which torchrun starts after that of rank 0."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(int(child) for child in children)


def test_a_full_disk_leaves_the_checkpoint_and_the_result(command, tmp_path, whole):
    flags = ["--resume", str(tmp_path / "kept"), "--checkpoint-every", "5"]
    child = start(command("r", *flags), tmp_path)
    while not list((tmp_path / "kept").glob("part-0/step-*")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    child = start(command("r", *flags), tmp_path, limit_bytes=50_000)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 2, said
    (error,) = [line for line in said.splitlines() if "error" in line.lower()]
    assert error.startswith("error: ")
    assert "free space" in error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    finish(start(command("r", *flags), tmp_path))
    assert learned(tmp_path / "r.json") == whole
