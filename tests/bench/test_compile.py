"""--backend compile: as auto, with blocks compiled, and no compiling on any clock."""

import functools
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bench import models, train
from bench.run import main
from blocksched import compile_blocks, extension

needs_cpp = pytest.mark.skipif(not extension.HAS_CPP, reason="the extension is not built")
ALL = "full_update,full_update#2,static_suffix,dynamic_suffix"
EARLY = "--steps 8 --lr 0.01 --dyn-freeze-start-frac 0 --dyn-warmup-steps 1 --dyn-probe-every 3"


@pytest.fixture
def compiler(monkeypatch):
    """A back end that needs no C++ compiler, and counts its graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        models, "compile_blocks", functools.partial(compile_blocks, backend=counter)
    )
    with torch._dynamo.config.patch(recompile_limit=8):
        yield counter
    torch.compiler.reset()


@needs_cpp
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    "extra",
    [
        ["--dtype", "float32"],
        ["--dtype", "bfloat16", "--task", "teacher", "--interleave"],
    ],
)
def test_as_auto_and_no_step_compiles(extra, compiler, tiny, tmp_path, capsys, monkeypatch):
    on_the_clock = []

    def step(arm, asked):
        before = compiler.frame_count
        plain_step(arm, asked)
        on_the_clock.append((arm.name, compiler.frame_count - before))

    plain_step = train.Arm._step
    monkeypatch.setattr(train.Arm, "_step", step)
    results = {}
    for backend in ("auto", "compile"):
        argv = [*tiny, "--preset", "seed", *EARLY.split(), *extra, "--schedules", ALL]
        path = tmp_path / f"{backend}.json"
        assert main([*argv, "--backend", backend, "--json-out", str(path)]) == 0
        said = capsys.readouterr().out
        assert ("each block by torch.compile:\nschedule" in said) == (backend == "compile")
        results[backend] = json.loads(path.read_text())
        assert (compiler.frame_count > 0) == (backend == "compile")
    assert all(graphs == 0 for _, graphs in on_the_clock)
    auto, compiled = ({row["schedule"]: row for row in r["results"]} for r in results.values())
    assert auto.keys() == compiled.keys()
    assert [row["fused"] for row in compiled.values()] == [False, True, False, True, True]
    for name in auto:
        one, two = (result["traces"][name]["train_losses"] for result in results.values())
        assert one == two, name
    parts = results["compile"]["traces"]["static_suffix"]["parts_ms"]["2"]
    assert min(parts.values()) > 0  # the mark between prefix and suffix too


def test_without_the_extension_it_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(extension, "HAS_CPP", False)
    assert main([*tiny, "--backend", "compile"]) == 2
    assert "--backend compile needs blocksched's extension" in capsys.readouterr().err
