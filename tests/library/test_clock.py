"""The wall clock leaves out what is off it."""

import time

import pytest
import torch

from blocksched.clock import WallClock


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    made = WallClock(torch.device("cpu"))
    made.now = now
    return made


def test_runs_pauses_and_resumes(clock):
    clock.now[0] += 1.0
    assert clock.elapsed_ms == pytest.approx(1000.0)
    clock.pause()
    clock.now[0] += 5.0
    assert clock.elapsed_ms == pytest.approx(1000.0)
    clock.resume()
    clock.resume()
    clock.tick()
    clock.now[0] += 0.5
    assert clock.elapsed_ms == pytest.approx(1500.0)


def test_is_set_on_resume(clock):
    clock.now[0] += 1.0
    clock.elapsed_ms = 7000.0
    clock.now[0] += 1.0
    assert clock.elapsed_ms == pytest.approx(8000.0)


@pytest.mark.cuda
def test_cuda_time_is_that_of_the_device():
    device = torch.device("cuda")
    clock = WallClock(device)
    torch.cuda._sleep(200_000_000)
    clock.tick()
    assert clock.elapsed_ms < 50.0  # nobody waited
    torch.cuda.synchronize()
    assert clock.elapsed_ms > 50.0
