"""Where the time of a step went, on a clock that the test moves."""

import itertools

import pytest
import torch

import blocksched.updates
from bench import phases
from bench.config import parser, resolve
from bench.phases import PARTS, Phases
from bench.tasks.text import TextTask
from bench.train import Arm
from blocksched.schedules import DynamicSuffix, StaticSuffix

CPU = torch.device("cpu")
STEM, BLOCK, HEAD, SUMS = 10, 1, 100, 7  # ms of each


@pytest.fixture
def clock(monkeypatch):
    """The marks' clock, in ms: it stands still unless `clock[0]` is moved."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter_ns", lambda: round(now[0] * 1e6))
    return now


@pytest.fixture
def arm(tiny, clock):
    """A function: schedule -> an arm of 12 steps whose forward alone moves the clock."""

    def build(schedule):
        config = resolve({k: v for k, v in vars(parser().parse_args(tiny)).items() if v})
        made = Arm("it", schedule, TextTask(config, CPU), config, None, fused=False)

        def takes(module, ms):
            def ran(*_):
                clock[0] += ms

            module.register_forward_hook(ran)

        takes(made.model.stem, STEM)
        takes(made.model.head, HEAD)
        for block in made.model.blocks:
            takes(block, BLOCK)
        return made

    return build


def test_marks_name_what_ended(clock):
    made = Phases(CPU, 0)
    for step, (active, part) in enumerate([(3, "backward"), (2, "update"), (3, "update")]):
        made.begin()
        clock[0] += 5
        made.mark("planning")  # no part: of the rest
        clock[0] += 2
        made.mark(part)
        clock[0] += 1
        made.mark(part)
        made.add(step, active, 11.0, made.read())
    none = dict.fromkeys(PARTS, 0)
    assert made.sums == {
        3: {**none, "steps": 2, "backward": 3.0, "update": 3.0, "other": 16.0},
        2: {**none, "steps": 1, "update": 3.0, "other": 8.0},
    }
    again = Phases(CPU, 0)
    again.load_state(made.state())
    assert again.sums == made.sums


@pytest.mark.parametrize(("steps", "counted"), [(2, 2), (3, 3), (4, 1), (6, 3)])
def test_warming_steps_are_left_out_if_there_are_others(steps, counted):
    made = Phases(CPU, 3)
    for step in range(steps):
        made.add(step, 1, 10.0**step, {})
    assert made.sums[1]["steps"] == counted
    assert made.sums[1]["other"] == sum(10.0**step for step in range(steps)[-counted:])


@pytest.mark.parametrize("active", [1, 3, 4])
def test_the_boundary_parts_prefix_from_suffix(active, arm, monkeypatch):
    made = arm(StaticSuffix(active=active))
    made.advance(12)  # its validations too, which do not count
    parts = made.phases.sums[active]
    assert parts["steps"] == 7
    assert parts["prefix forward"] == 7 * (STEM + (4 - active) * BLOCK)
    assert parts["suffix forward"] == 7 * (active * BLOCK + HEAD)
    assert parts["backward"] == parts["update"] == parts["measure"] == 0
    monkeypatch.setattr(Phases, "mark", lambda *_: pytest.fail("a validation was timed"))
    made._evaluate()


def test_the_sums_of_a_probe_are_measuring(arm, clock, monkeypatch):
    def sums(*arguments):
        clock[0] += SUMS
        return block_sums(*arguments)

    block_sums = blocksched.updates.block_sums
    monkeypatch.setattr(blocksched.updates, "block_sums", sums)
    made = arm(DynamicSuffix(warmup_steps=2, probe_every=2, refresh_every=0, freeze_start_frac=0.0))
    made.advance(12)
    probes = sum(step.probe for step in made.steps[5:])
    assert probes > 1
    assert sum(parts["measure"] for parts in made.phases.sums.values()) == probes * SUMS
    assert sum(parts["update"] for parts in made.phases.sums.values()) == 0


class Event:
    """Stands in for torch.cuda.Event: stamped with the clock's time."""

    made = 0
    clock: list[float]

    def __init__(self, enable_timing):
        assert enable_timing
        type(self).made += 1

    def record(self, stream):
        assert stream == "the stream of cuda:1"
        self.at = self.clock[0]

    def elapsed_time(self, after):
        return after.at - self.at


def test_on_cuda_events_are_made_once(clock, monkeypatch):
    Event.clock = clock
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    made = Phases(torch.device("cuda", 1), 0)
    for _ in range(3):
        made.begin()
        for ms, part in enumerate(PARTS, start=1):
            clock[0] += ms
            made.mark(part)
        assert made.read() == dict(zip(PARTS, itertools.count(1.0)))
    assert Event.made == len(PARTS) + 1


@pytest.mark.cuda
def test_on_a_gpu():
    made = Phases(torch.device("cuda"), 0)
    a = torch.randn(4096, 4096, device="cuda")
    made.begin()
    made.mark("measure")
    for _ in range(20):
        a = a @ a * 1e-3
    made.mark("backward")
    torch.cuda.synchronize()
    parts = made.read()
    assert parts["backward"] > 10 * parts["measure"] > 0
