"""The measured clock: arms side by side on one budget, kept together, evaluation off it."""

import time

import pytest

import bench.trials.cells as cells
from bench.config import UserError
from bench.results import read
from bench.runner import GROUP
from bench.tasks.text import TextTask
from bench.train import Arm
from bench.trials.cells import Cells
from bench.trials.design import load
from blocksched import BlockScheduler
from tests.trials.tiny import run, study_file

CLOCK = 'clock = "time"\nseeds = [1]'
TWO = {"full_update": {}, "top2": {"schedule": "static_suffix"}}
STEP_S = 0.25  # that a step takes by the clock that stands in for the machine's


@pytest.fixture
def made(text_file, tmp_path):
    """A function: arms -> a study file, on the measured clock."""
    return lambda arms=TWO, top=CLOCK, **flags: study_file(
        tmp_path / "study", text_file, arms, top, **flags
    )


@pytest.fixture
def clock(monkeypatch):
    """Stands still but in a step's loss, which takes STEP_S in training and 100 s in evaluation."""

    class Clock:
        now = 0.0
        evaluation = 100.0

    loss = TextTask.loss

    def slow(task, outputs, targets):
        Clock.now += STEP_S if outputs.requires_grad else Clock.evaluation
        return loss(task, outputs, targets)

    monkeypatch.setattr(TextTask, "loss", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(cells, "Expected", lambda *_: None)
    return Clock


@pytest.fixture
def advances(monkeypatch):
    """The milliseconds of every arm before and after each time that one of them advances."""
    arms, seen = [], []

    class Watched(Arm):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            arms.append(self)

        def advance(self, steps):
            before = {arm.name: arm.elapsed_ms for arm in arms if not arm.finished}
            found = super().advance(steps)
            seen.append((self.name, before, self.elapsed_ms))
            return found

    monkeypatch.setattr(cells, "Arm", Watched)
    return seen


@pytest.mark.usefixtures("clock")
def test_the_arms_advance_side_by_side(made, advances):
    slow = {"schedule": "full_update", "time_factor": 3}
    run(made(TWO | {"slow": slow}))
    assert len(advances) > 6
    longest = {"full_update": STEP_S, "top2": STEP_S, "slow": 3 * STEP_S}
    for name, before, after in advances:
        assert before[name] == min(before.values())  # who is behind
        assert after - before[name] <= GROUP * longest[name] * 1e3 + 1e-6
    together = [before for _, before, _ in advances if len(before) == 3]
    spread = max(max(before.values()) - min(before.values()) for before in together)
    assert 0 < spread <= GROUP * 3 * STEP_S * 1e3


def test_evaluation_is_off_the_clock(made, clock):
    """However long it takes; the steps that fit are the same."""
    found = run(made()).done
    cell = found["text", "top2", 1]
    assert cell["mean_step_ms"] == pytest.approx(STEP_S * 1e3)
    assert cell["elapsed_ms"] == pytest.approx(cell["steps"] * STEP_S * 1e3)
    assert clock.now > len(cell["val_trace"]) * clock.evaluation
    assert cell["budget_ms"] == pytest.approx(12 * STEP_S * 1e3)
    assert cell["steps"] == found["text", "full_update", 1]["steps"] == 12


def test_planning_and_measuring_are_on_the_clock(made, clock, monkeypatch):
    step = BlockScheduler.step

    def slow(scheduler, *args):
        clock.now += 1.0
        return step(scheduler, *args)

    monkeypatch.setattr(cells, "measured_budget_ms", lambda *_: 12 * STEP_S * 1e3)
    monkeypatch.setattr(BlockScheduler, "step", slow)
    cell = run(made()).done["text", "full_update", 1]
    assert cell["steps"] < 12
    # The first plan is made before the clock starts, and after the last step there is none.
    wanted = (cell["steps"] * STEP_S + (cell["steps"] - 1)) * 1e3
    assert cell["elapsed_ms"] == pytest.approx(wanted)


def test_one_budget_for_all_in_one_file(made):
    path = made(top='clock = "time"\nseeds = [1, 2]')
    found = run(path).done
    assert sorted(each.name for each in (path.parent / "out").iterdir()) == [
        "text-1.json", "text-2.json",
    ]  # fmt: skip
    for seed in (1, 2):
        one, two = (found["text", arm, seed] for arm in TWO)
        assert one["budget_ms"] == two["budget_ms"] > 0
        for cell in (one, two):
            longest = cell["elapsed_ms"] - cell["budget_ms"]
            assert longest >= 0 or cell["steps"] == 12 * 20
            assert cell["clock"] == "time"
    stamp = (path.parent / "out" / "text-1.json").stat().st_mtime_ns
    assert run(path).done == found
    assert (path.parent / "out" / "text-1.json").stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("clock")
def test_a_time_factor_on_the_measured_clock(made):
    slow, fast = ({"schedule": "full_update", "time_factor": f} for f in (3, 1 / 3))
    found = run(made({"full_update": {}, "slow": slow, "fast": fast})).done
    steps = [found["text", arm, 1]["steps"] for arm in ("slow", "full_update", "fast")]
    assert steps == pytest.approx([5, 12, 36], abs=1)  # 5: --warmup-ignore-steps, the least


def test_another_set_of_arms_is_refused(made):
    path = made()
    run(path)
    for arms in (TWO | {"grow": {}}, {"full_update": {}}):
        with pytest.raises(UserError, match="ran side by side") as caught:
            Cells(load(made(arms)), path.parent / "out")
        assert "text-1.json compares text, seed 1: full_update, top2" in str(caught.value)


def test_nothing_of_a_round_that_was_stopped_is_kept(made, monkeypatch):
    """What ran side by side is whole or not there; the next run begins it anew."""
    path = made(top='clock = "time"\nseeds = [1, 2]')
    advance, left = Arm.advance, [7]

    def stopped(arm, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return advance(arm, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Arm, "advance", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    files = [each.name for each in (path.parent / "out").iterdir()]
    assert files in ([], ["text-1.json"])
    assert len(run(path).done) == 4
    assert len(read(path.parent / "out" / "text-2.json")["cells"]) == 2
