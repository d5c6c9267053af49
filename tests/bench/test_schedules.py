"""Every schedule in the benchmark: trains, is shown, replayed, and goes on where it was stopped."""

import pytest

import bench.runner
from bench.config import Config
from bench.pages.evidence import load
from bench.results import read
from bench.run import main
from blocksched.schedules.flags import NAMES, flags_of, option
from tests.bench.test_resume import SAME, Stopper

LINE = "--preset seed --dtype float32 --steps 16 --lr 0.01 --random-counts 1,3,2,6 --no-html"
SHORT = {
    "lisa": "--lisa-interval 3",
    "cyclic": "--cyclic-interval 3",
    "grow": "--grow-blocks 1,2 --grow-until 0.3,0.6",
    "autofreeze": "--autofreeze-intervals 4 --autofreeze-probes 1",
    "grades": "--grades-alpha 0.3 --grades-tau 2",
    "row_suffix": "--row-active 2 --row-rows 0.5",
}
# Moved by measured times, which no second run repeats.
TIMED = ("payoff",)


def run(tiny, name, path, *more):
    flags = [*LINE.split(), *SHORT.get(name, "").split(), "--schedules", name]
    return main([*tiny, *flags, "--json-out", str(path), *more])


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_is_replayed(name, tiny, tmp_path, capsys):
    path = tmp_path / "r.json"
    assert run(tiny, name, path) == 0
    (found,) = load(path).runs
    assert found.name == name
    assert len(found.losses) == 16
    assert found.losses[-1] < found.losses[0]
    assert all(1 <= k <= 4 for k in found.active)
    if name not in ("full_update", "row_suffix", "payoff", "dynamic_suffix", "lora"):
        assert min(found.active) < 4
    capsys.readouterr()
    assert main(["--replay", str(path)]) == 0
    assert "16 steps, 0 differences" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TIMED])
def test_it_goes_on_where_it_was_stopped(name, tiny, tmp_path, monkeypatch):
    """Each at another step; the weights at the end are the same to the bit."""
    kept = ["--resume", str(tmp_path / "kept"), "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "Live", lambda: Stopper(2))
        assert run(tiny, name, tmp_path / "r.json", *kept) == 130
    assert run(tiny, name, tmp_path / "r.json", *kept) == 0
    assert run(tiny, name, tmp_path / "whole.json") == 0
    parts, whole = read(tmp_path / "r.json"), read(tmp_path / "whole.json")
    assert parts["results"][0]["weights_sha256"] == whole["results"][0]["weights_sha256"]
    for key in (*SAME, "running_blocks"):
        assert parts["traces"][name].get(key) == whole["traces"][name].get(key), key


def test_each_field_of_a_schedule_is_a_flag():
    config, seen = Config(), set()
    for name in NAMES:
        for flag in flags_of(name):
            assert flag.declared.metadata["help"]
            assert getattr(config, flag.key) == flag.declared.default
            assert flag.key not in seen, option(flag.key)
            seen.add(flag.key)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lisa --lisa-active 9", "active must be 1..4, got 9"),
        ("grow --grow-blocks 2,x", "--grow-blocks must be numbers separated by commas, got '2,x'"),
        ("grow --grow-then lisa", "--grow-then must be one of full_update, static_suffix, dynam"),
        ("random_suffix --random-counts 1,2", "counts must be 4 numbers"),
        ("row_suffix --row-rows 0", "--row-rows must be > 0 and <= 1, got 0"),
        ("freezeout#2,lysa", "unknown schedule 'lysa': choose among full_update"),
    ],
)
def test_what_is_refused(line, said, tiny, tmp_path, capsys):
    name, _, flags = line.partition(" ")
    assert run(tiny, name, tmp_path / "r.json", *flags.split()) == 2
    assert said in capsys.readouterr().err


def test_random_suffix_is_like_a_recording(tiny, tmp_path, capsys):
    recorded = tmp_path / "recorded.json"
    flags = "--dyn-warmup-steps 2 --dyn-freeze-start-frac 0 --dyn-relevance-threshold 0.1"
    assert run(tiny, "dynamic_suffix", recorded, *flags.split()) == 0
    path = tmp_path / "r.json"
    without = LINE.replace("--random-counts 1,3,2,6", "").split()
    line = [*tiny, *without, "--schedules", "random_suffix", "--json-out", str(path)]
    assert main([*line, "--random-like", str(recorded)]) == 0
    (one,), (other,) = load(recorded).runs, load(path).runs
    assert sorted(one.active) == sorted(other.active)
    assert one.active != other.active
    capsys.readouterr()
    assert main(line) == 2
    assert "give its result file to --random-like" in capsys.readouterr().err
    assert main([*line, "--random-like", str(path)]) == 2
    assert "holds no dynamic_suffix" in capsys.readouterr().err
