"""A save that is killed, or that the disk refuses, leaves what was there before."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest

from blocksched.checkpoint import CheckpointError
from blocksched.checkpoint.folders import found, verify
from tests.library.checkpoint_loop import STEPS, Loop

SAVE_EVERY = 2


@pytest.fixture(scope="module")
def start():
    """Runs function(*arguments) in a process of its own, forked from one that only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blocksched.checkpoint"])

    def run(function, *arguments):
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def expected():
    """The state after each step of a run that nobody stops."""
    loop = Loop()
    states = [loop.state()]
    for _ in range(STEPS):
        loop.step()
        states.append(loop.state())
    return states


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_and_die(folder, at):
    """Save step 2, and be killed when the disk is touched for the `at`-th time."""
    loop = Loop()
    loop.load(folder)
    loop.step()
    touched = 0

    def count(event, arguments):
        nonlocal touched
        inside = bool(arguments) and str(arguments[0]).startswith(str(folder))
        if inside or event in ("os.remove", "os.rmdir"):  # these by a name in an open folder
            touched += 1
            if touched == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    loop.save(folder, 2, keep=1)
    os._exit(0)


def die_everywhere(folder, stride, pipe):
    """Sends what was there after each death: step, state, whether all checkpoints were whole."""
    status, at = None, 1
    while status != 0:
        here = shutil.copytree(folder, folder.with_name(str(at)))
        child = os.fork()
        if child == 0:
            save_and_die(here, at)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        loop = Loop()
        step = loop.load(here).step
        for path in found(here):
            verify(path, bool)
        loop.save(here, 3, keep=1)
        pipe.send((status, step, loop.state(), names(here)))
        at += stride


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_wherever_it_touches_the_disk(tmp_path, start, expected, stride):
    loop = Loop()
    loop.step()
    loop.save(tmp_path / "before", 1)
    ours, theirs = multiprocessing.Pipe()
    process = start(die_everywhere, tmp_path / "before", stride, theirs)
    seen, status = [], None
    while status != 0:
        assert ours.poll(20)
        status, step, state, left = ours.recv()
        assert status in (0, -signal.SIGKILL)
        assert state == expected[step]
        assert left == ["step-00000003"]
        seen.append(step)
    process.join()
    assert seen == sorted(seen)
    assert seen.count(1) > 20 / stride
    assert seen.count(2) > 4 / stride


def train(folder):
    loop = Loop()
    loaded = loop.load(folder)
    for step in range(0 if loaded is None else loaded.step, STEPS):
        loop.step()
        if (step + 1) % SAVE_EVERY == 0:
            loop.save(folder, step + 1, keep=1)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_random_moments_the_run_ends_as_if_it_had_not_been(
    tmp_path, start, expected, kills, request
):
    draw = random.Random(request.node.name)
    steps = []
    while len(steps) < kills:
        folder = tmp_path / str(len(steps))
        process = start(train, folder)
        while not folder.exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.join()
        process = start(train, folder)
        process.join()
        assert process.exitcode == 0
        loop = Loop()
        steps.append(loop.load(folder).step)
        assert steps[-1] == STEPS
        assert loop.state() == expected[STEPS]


def save_within(folder, limit, pipe):
    """Save step 2 where no file may have more than `limit` bytes."""
    loop = Loop(width=48)
    loop.load(folder)
    loop.step()
    before = loop.state()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        loop.save(folder, 2)
        pipe.send("saved")
    except CheckpointError as error:
        pipe.send(str(error) if loop.state() == before else "the model changed")


def test_a_full_disk_leaves_all_as_it_was(tmp_path, start):
    loop = Loop(width=48)
    loop.step()
    largest = max(file.stat().st_size for file in loop.save(tmp_path, 1).iterdir())
    for limit in (0, 9_000, largest - 1):
        ours, theirs = multiprocessing.Pipe()
        process = start(save_within, tmp_path, limit, theirs)
        process.join()
        assert process.exitcode == 0
        said = ours.recv()
        assert "free space or save elsewhere" in said
        assert "File too large" in said
        assert names(tmp_path) == ["step-00000001"]
        assert Loop(width=48).load(tmp_path).step == 1


def test_only_the_last_are_kept(tmp_path):
    loop = Loop()
    for step in range(5):
        loop.save(tmp_path, step, keep=3)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (2, 3, 4)]
    loop.save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004.1"]


def test_a_step_that_is_there_is_saved_beside(tmp_path, expected):
    loop = Loop()
    loop.step()
    for serial in range(11):
        loop.save(tmp_path, 1, keep=20)
        assert len(names(tmp_path)) == serial + 1
    loop.step()
    loop.save(tmp_path, 1, keep=20)
    newest = Loop()
    assert newest.load(tmp_path).step == 1
    assert newest.state() == expected[2]
    assert (tmp_path / "step-00000001.11").exists()


def test_a_later_step_is_another_run(tmp_path):
    loop = Loop()
    loop.save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="step-00000003 is of a later step than 2: load it"):
        loop.save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000003"]


def test_what_a_dead_writer_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".tmp-0123").mkdir()
    (tmp_path / ".tmp-0123" / "model.pt").write_text("")
    (tmp_path / "notes").mkdir()
    Loop().save(tmp_path, 1)
    assert names(tmp_path) == ["notes", "step-00000001"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(CheckpointError, match=r"must name a folder.*Not a directory"):
            Loop().save(folder, 1)
