"""Damaged result files: each is an error of one line, none is read in silence."""

import random
from pathlib import Path

import pytest

from bench.run import main

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
WHOLE, OTHER = (
    (RESULTS / name).read_bytes() for name in ("cpu-small-text.json", "cpu-small-finetune.json")
)


def damaged(number: int) -> bytes:
    """The file with one of five kinds of damage."""
    source = random.Random(number)
    i, length = source.randrange(len(WHOLE)), source.randrange(1, 4000)
    match number % 5:
        case 0:
            flipped = WHOLE[i] ^ 1 << source.randrange(8)
            return WHOLE[:i] + bytes([flipped]) + WHOLE[i + 1 :]
        case 1:
            return WHOLE[:i]
        case 2:
            return WHOLE[:i] + WHOLE[i + length :]
        case 3:
            return WHOLE + WHOLE[i : i + length]
        case _:
            return WHOLE[:i] + OTHER[i : i + length] + WHOLE[i + length :]


def check(number, tmp_path, capsys):
    path = tmp_path / "damaged.json"
    path.write_bytes(damaged(number))
    assert main(["--replay", str(path)]) == 2, number
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} "), number
    assert said.count("\n") == 1, number


def test_damaged_result_files(tmp_path, capsys):
    for number in range(40):
        check(number, tmp_path, capsys)


@pytest.mark.soak
def test_two_hundred_damaged_result_files(tmp_path, capsys):
    for number in range(1000, 1200):
        check(number, tmp_path, capsys)


def test_the_whole_file_is_read(capsys):
    assert main(["--replay", str(RESULTS / "cpu-small-text.json")]) == 0
    assert " 0 differences" in capsys.readouterr().out
