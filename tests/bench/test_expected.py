"""The expected step time: its parts, and the line between two anchors."""

import pytest
import torch

from bench.config import resolve
from bench.expected import Expected
from bench.tasks.teacher import TeacherTask

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
    assert expected.anchors == [2, 4, 6, 8]
    parts = expected.parts_ms()
    assert set(parts) == {"stem and prefix", "suffix", "head", "update", "step"}
    for name, by_active in parts.items():
        assert set(by_active) == {2, 4, 6, 8}
        assert all(ms > 0 for k, ms in by_active.items() if (name, k) != ("stem and prefix", 8))
    assert set(expected.efficiency()) == {2, 4, 6, 8}


def test_between_anchors_is_on_the_line_and_full_stands_alone(expected):
    for name in ("stem and prefix", "suffix", "head", "update"):
        for k in (2, 4, 6):
            expected._parts[name, k] = [10.0 * k]
        expected._parts[name, 8] = [1000.0]
    assert [expected.step_ms(k) for k in (1, 2, 3, 5, 7)] == [40.0, 80.0, 120.0, 200.0, 280.0]
    assert expected.step_ms(8) == 4000.0


def test_the_first_round_only_warms_up(expected):
    assert {len(times) for times in expected._parts.values()} == {1}
    expected.round()
    assert {len(times) for times in expected._parts.values()} == {2}


def test_one_block():
    config = resolve({**TINY, "n_layers": 1, "static_active_layers": 1})
    made = Expected(TeacherTask(config, torch.device("cpu")), config, fused=False)
    assert made.anchors == [1]
    assert made.step_ms(1) > 0
