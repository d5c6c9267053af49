"""--preflight: what a run takes is said before it trains, and too much is an error."""

import re
from unittest import mock

import pytest
import torch

import bench.preflight
import bench.runner
from bench.config import UserError, resolve
from bench.preflight import preflight
from bench.run import main
from bench.tasks.text import TextTask

SIZES = {
    "device": "cpu", "preset": "seed", "dtype": "float32", "dmodel": 16, "n_layers": 4,
    "seq_len": 16, "batch_size": 2, "static_active_layers": 2,
}  # fmt: skip
WEIGHTS = 4 * (4 * 12 * 16 * 16 + 2 * 256 * 16)
"""Bytes of the model: 4 blocks of 12 d^2 numbers, an embedding and a head of 256 d."""


@pytest.fixture
def task(text_file):
    config = resolve(SIZES | {"data": str(text_file)})
    return TextTask(config, torch.device("cpu")), config


def test_bytes_of_a_full_step(task):
    stays, takes, gradients = bench.preflight._full_step(*task, fused=False)
    steps = 4 * 20  # a step count for each parameter tensor
    assert gradients == WEIGHTS
    assert 3 * WEIGHTS < stays <= 3 * WEIGHTS + steps
    kept = takes - stays - gradients
    rows = 2 * 16 * 16 * 4  # one activation of the width
    assert 4 * 10 * rows < kept < 4 * 60 * rows


def test_what_is_said_adds_up(task, capsys, monkeypatch):
    monkeypatch.setattr(bench.preflight, "_MIB", 1)
    stays, takes, gradients = bench.preflight._full_step(*task, fused=False)
    for processes, more in ((1, 0), (2, gradients)):  # buckets hold the gradients once more
        preflight(*task, {"a": False, "b": False, "c": False}, processes)
        said = [int(float(n.replace(",", ""))) for n in _numbers(capsys.readouterr().out)]
        assert said == [takes + more, stays, takes + more + 3 * stays]


def _numbers(text: str) -> list[str]:
    return re.findall(r"[\d,]+\.\d", text)


def test_a_copy_is_taken(task):
    """No model of the run moves, and training does not depend on --preflight."""
    own, config = task
    before = [p.clone() for p in own.model(fused=False).parameters()]
    preflight(own, config, {"a": False}, 1)
    after = own.model(fused=False).parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("where", ["forward", "loss"])
def test_out_of_memory_is_an_error_before_training(where, tiny, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(TextTask, where, full)
    monkeypatch.setattr(bench.runner, "Expected", lambda *_: pytest.fail("it went on"))
    argv = [*tiny, "--preflight", "--json-out", str(tmp_path / "r.json")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in ("error: --preflight", "does not fit cpu", "--batch-size", "--n-layers"):
        assert word in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("free", [10, 1 << 40])
def test_what_is_free_decides_on_a_gpu(free, capsys, monkeypatch):
    monkeypatch.setattr(bench.preflight, "_full_step", lambda *_: (30, 100, 10))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 41))
    gpu = mock.Mock(device=torch.device("cuda", 0))
    if free == 10:
        with pytest.raises(UserError, match=r"--batch-size"):
            preflight(gpu, None, {"a": True}, 1)
    else:
        preflight(gpu, None, {"a": True}, 1)
    assert "are free on cuda:0" in capsys.readouterr().out


@pytest.mark.cuda
def test_a_step_takes_about_what_was_said(text_file):
    config = resolve(SIZES | {"device": "cuda", "dmodel": 256, "data": str(text_file)})
    own = TextTask(config, torch.device("cuda", 0))
    stays, takes, gradients = bench.preflight._full_step(own, config, fused=False)
    assert takes > stays + gradients
