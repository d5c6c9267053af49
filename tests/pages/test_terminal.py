"""A result in a terminal: nothing longer than its lines, nothing in it but text, no number lost."""

import io
import math

import pytest

from bench.pages.evidence import evidence, load
from bench.pages.spark import BLOCKS, DIGITS, levels_of, spark
from bench.pages.terminal import summary
from bench.pages.words import headline
from tests.pages.cases import CORNERS, RECORDING, result


@pytest.fixture
def shown(monkeypatch):
    """What the summary of a result file's content says in so many columns."""

    def shown(content, columns: int = 80, encoding: str = "utf-8") -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return summary(evidence(content, "made"), stream)

    return shown


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 5, ""),
        ([0.0, 7.0], 0, ""),
        ([0.0, 7.0], -3, ""),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "01234567"),
        ([7, 6, 5, 4, 3, 2, 1, 0], 100, "76543210"),
        ([0, 2, 12, 16], 2, "07"),  # means of 1 and 14
        ([0, None, 7], 3, "0 7"),
        ([0, math.nan, math.inf, 7], 4, "0  7"),
        ([None, 0, 7, None], 2, "07"),  # what is missing does not pull a mean
        ([None, None], 2, "  "),
        ([3.0], 5, "4"),
        ([3.0, 3.0, 3.0], 5, "444"),
        ([1e9, 1e9 + 1], 2, "07"),
    ],
)
def test_a_curve(values, width, drawn):
    assert spark(values, width, DIGITS) == drawn
    assert spark(values, width) == drawn.translate(str.maketrans(DIGITS, BLOCKS))


def test_a_curve_on_a_given_scale():
    assert spark([0, 4, 8], 3, DIGITS, (0, 8)) == "047"
    assert spark([4, 4], 2, DIGITS, (0, 8)) == "44"
    assert spark([-5, 20], 2, DIGITS, (0, 8)) == "07"


def test_a_long_curve_is_the_means_of_even_parts():
    values = [float(i % 10 + 10 * (i // 1000)) for i in range(8000)]
    assert spark(values, 8, DIGITS) == "01234567"


@pytest.mark.parametrize(
    ("encoding", "levels"),
    [("utf-8", BLOCKS), ("ascii", DIGITS), ("latin-1", DIGITS), ("cp1252", DIGITS)],
)
def test_digits_where_the_encoding_has_no_blocks(encoding, levels):
    assert levels_of(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) == levels
    assert levels_of(io.StringIO()) == DIGITS  # it does not say


def test_the_verdict_first_then_the_table_then_the_curves(shown):
    content = result()
    lines = shown(content, 140, "ascii")
    assert lines[0] == "made: Keep dynamic_suffix (an indication: one seed)."
    assert lines[2].split()[:3] == ["schedule", "val", "loss"]
    for row, line in zip(content["results"], lines[3:6], strict=True):
        assert line.split()[:2] == [row["schedule"], f"{row['final_val_loss']:.4f}"]
    dynamic = content["results"][2]
    said = f"dynamic_suffix: final validation loss {dynamic['final_val_loss']:.4f} after "
    start = lines.index(said + f"{dynamic['elapsed_ms'] / 1e3:.1f} s")
    losses = [point["val_loss"] for point in content["traces"]["dynamic_suffix"]["val_trace"]]
    assert lines[start + 1].split() == [
        *("val", "loss", spark(losses[1:], 32, DIGITS)),
        *(f"{losses[1]:.4f}", "to", f"{losses[-1]:.4f}"),
    ]
    active = content["traces"]["dynamic_suffix"]["active_layers_hist"]
    assert lines[start + 2].split() == [
        *("active", spark(active, 32, DIGITS, (0, 6)), "3", "to", "6", "of", "6", "blocks")
    ]


def test_training_losses_where_there_are_no_validations():
    lines = summary(load(RECORDING), io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sum(line.startswith("  train loss") for line in lines) == 3
    assert any("12 to 18 of 18 blocks" in line for line in lines)
    assert any("final validation loss 0.1117 after 76.1 s" in line for line in lines)


@pytest.mark.parametrize("columns", [1, 20, 40, 80, 200])
@pytest.mark.parametrize("name", CORNERS)
def test_no_line_is_longer_than_the_terminal_is_wide(name, columns, shown):
    lines = shown(CORNERS[name](), columns)
    assert lines
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_columns_that_do_not_fit_stand_below(columns, shown):
    said = " ".join(" ".join(shown(result(), columns)).split())
    for column in ("val loss", "mean ms", "speed-up", "probes", "kept for bwd", "ms / expected"):
        assert column in said


def test_names_cannot_command_the_terminal(shown):
    evil = "dynamic_suffix\x1b[2J\r\n\x07 \u4e2d\u6587\u202e" + 300 * "x"
    content = result(names=("full_update", evil))
    content["results"][1]["failure"] = "stopped \x1b]0;title\x07"
    lines = shown(content, 100, "ascii")
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("dynamic_suffix"))
    assert f"{content['results'][1]['final_val_loss']:.4f}" in row  # the table is one still


def test_a_schedule_that_failed_says_so(shown):
    lines = shown(CORNERS["nulls"](), 100)
    assert any(
        line.startswith("dynamic_suffix: no final loss")
        and line.endswith("stopped: 21 steps in a row were not finite")
        for line in lines
    )


def test_an_interrupted_run_has_no_result(shown):
    lines = shown(CORNERS["interrupted"]())
    verdict = headline(evidence(CORNERS["interrupted"](), "made"))[0]
    assert lines[0] == f"made: {verdict}"
    assert verdict.startswith("No result")
    assert sum("no final loss" in line for line in lines) == 3
