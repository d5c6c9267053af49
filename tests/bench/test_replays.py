"""--replay on the command line: recorded decisions verified, or other schedules tried on them."""

import json

import pytest

from bench.run import main
from tests.schedules.recordings import on_disk, record

NAMES = ("full_update", "dynamic_suffix", "autofreeze")


@pytest.fixture
def path(tmp_path):
    recording = on_disk({name: record(name) for name in NAMES})
    del recording["traces"]["dynamic_suffix"]  # which test_replay.py has, with its trace
    (tmp_path / "r.json").write_text(json.dumps(recording))
    return tmp_path / "r.json"


def test_decisions_are_verified(path, capsys):
    assert main(["--replay", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 80 steps, 0 differences\n"
    recording = json.loads(path.read_text())
    recording["traces"]["full_update"]["active_layers_hist"][7:] = [5] * 33
    del recording["traces"]["autofreeze"]["readings"]
    path.write_text(json.dumps(recording))
    assert main(["--replay", str(path)]) == 1
    first, *shown, last = capsys.readouterr().out.splitlines()
    assert first == f"{path}: 40 steps, 33 differences"
    assert shown[0] == "  full_update step 7: 6 active, recorded 5"
    assert len(shown) == 5
    assert last == "  autofreeze left out: the file lacks the readings that it decided by"


def test_other_schedules_are_tried(path, capsys):
    asked = ["--schedules", "static_suffix, lisa,dynamic_suffix", "--static-active-layers", "2"]
    assert main(["--replay", str(path), *asked, "--lisa-active", "6"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{path}: what would have been done in the 40 steps of its autofreeze"
    assert lines[:4] == [
        "  static_suffix: 2.0 active blocks (least 2, most 2), 0 probes, "
        "56% of a full update's cost",
        "    % of steps in which each block trained, block 0 first: 0 0 0 0 100 100",
        "  lisa: 6.0 active blocks (least 6, most 6), 0 probes, 100% of a full update's cost",
        "    % of steps in which each block trained, block 0 first: 100 100 100 100 100 100",
    ]
    assert "dynamic_suffix: " in lines[4]
    assert lines[6] == "    it decides by grad_ratio, recorded is grad_norm"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedules", "lysa"], "cannot be replayed: --schedules lysa: unknown schedule"),
        (["--schedules", ", "], "--schedules must name at least one schedule, got none"),
        (["--schedules", "lisa", "--lisa-active", "7"], "--schedules lisa: active must be 1..6"),
        (["--schedules", "lisa", "--n-layers", "7"], "takes flags of schedules only, got --n-lay"),
        (["--schedules", "lisa", "--random-like", "x"], "of schedules only, got --random-like"),
    ],
)
def test_refused_in_a_line(path, capsys, flags, message):
    assert main(["--replay", str(path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
