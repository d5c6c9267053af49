"""The expected step time: its parts, and the line between two anchors."""

import json

import pytest
import torch

from bench import expected as module
from bench.config import resolve
from bench.costs import PARTS, Shape, anchors
from bench.expected import Expected
from bench.tasks.teacher import TeacherTask
from blocksched.schedules import Plan

TINY = {
    "task": "teacher", "device": "cpu", "dmodel": 8, "n_layers": 8, "seq_len": 4, "batch_size": 2,
    "val_batches": 1,
}  # fmt: skip


@pytest.fixture
def expected():
    config = resolve(TINY)
    made = Expected(TeacherTask(config, torch.device("cpu")), config, fused=False)
    made.round()
    return made


def test_every_part_is_timed_at_every_anchor(expected):
    parts = expected.parts_ms()
    assert set(parts) == {"stem and prefix", "suffix", "head", "update", "step"}
    for name, by_active in parts.items():
        assert set(by_active) == {2, 4, 6, 8}
        assert all(ms > 0 for k, ms in by_active.items() if (name, k) != ("stem and prefix", 8))
    assert set(expected.efficiency()) == {2, 4, 6, 8}


def test_between_anchors_is_on_the_line_and_full_stands_alone(expected):
    for name in PARTS:
        for k in (2, 4, 6):
            expected._parts[name, Shape.suffix(k, 8)] = [10.0 * k]
        expected._parts[name, Shape.suffix(8, 8)] = [1000.0]
    assert [expected.step_ms(k) for k in (1, 2, 3, 5, 7)] == [40.0, 80.0, 120.0, 200.0, 280.0]
    assert expected.step_ms(8) == 4000.0


def test_the_first_round_only_warms_up(expected):
    assert {len(times) for times in expected._parts.values()} == {1}
    expected.round()
    assert {len(times) for times in expected._parts.values()} == {2}


class Clock:
    """A clock that goes on by what each timed part is said to take, and by an hour in between."""

    def __init__(self, monkeypatch, ms):
        self.now_s, self.slow = 0.0, 1.0
        timed = Expected._timed

        def counted(made, name, shape, part):
            def slept():
                result = part()
                self.now_s += self.slow * ms(name, shape) / 1e3
                return result

            self.now_s += 3600
            return timed(made, name, shape, slept)

        monkeypatch.setattr(Expected, "_timed", counted)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now_s)


def test_what_whole_steps_take_over_what_is_expected(monkeypatch):
    """Steps with holes take a tenth more than their parts, all others what they should."""
    holes, between = Plan((1, 3, 4)), Shape(1, 3, 4)
    parts = {"stem and prefix": 3.0, "suffix": 30.0, "head": 5.0, "update": 2.0}

    def ms(name, shape):
        if name != "step":
            return parts[name] * (name != "stem and prefix" or not shape.stem)
        return (40.0 if not shape.stem else 37.0) * (1.1 if shape.frozen else 1.0)

    clock = Clock(monkeypatch, ms)
    config = resolve(TINY)
    made = Expected(TeacherTask(config, torch.device("cpu")), config, fused=False, beside=[holes])
    for clock.slow in (1.0, 7.0, 1.5):  # a moment in which the machine is slow hits all alike
        made.round()
    assert made.shape_ms(between) == pytest.approx(1.5 * 40.0)
    assert made.efficiency() == pytest.approx(dict.fromkeys((2, 4, 6, 8), 1.0))
    found = made.measured_over_expected()
    assert set(found) == {*anchors(8), between}
    for shape, ratio in found.items():
        assert ratio == pytest.approx(1.1 if shape.frozen else 1.0), shape


def test_it_goes_on_where_it_was_saved(expected):
    saved = json.loads(json.dumps(expected.state()))
    config = resolve(TINY)
    again = Expected(TeacherTask(config, torch.device("cpu")), config, fused=False)
    again.load_state(saved)
    assert again.rounds == expected.rounds
    for shape in anchors(8):
        assert again.shape_ms(shape) == expected.shape_ms(shape)
    again.round()
    assert again.rounds == expected.rounds + 1


def test_one_block():
    config = resolve({**TINY, "n_layers": 1, "static_active_layers": 1})
    made = Expected(TeacherTask(config, torch.device("cpu")), config, fused=False)
    assert set(made.parts_ms()["step"]) == {1}
    assert made.step_ms(1) > 0
