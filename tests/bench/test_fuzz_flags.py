"""Any command line: training begins, or exit status 2 and one line that says what is wrong."""

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bench.run
from bench.config import Config
from blocksched.schedules.flags import option

HINTS = get_type_hints(Config)
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
SIZES = ("dmodel", "n_layers", "hidden_mult", "batch_size", "seq_len", "val_batches")
# Sizes that fit a test, or no machine at all: nothing is built of the second.
SIZE = st.sampled_from(["-1", "0", "1", "2", "4", "16", "1e3", "10000000000000", "9" * 40])
WHOLE = st.integers(-2, 300).map(str) | st.sampled_from(
    ["-0", "1_0", "\u0661", "9" * 25, "9" * 5000]
)
REAL = (
    st.floats().map(repr)
    | st.floats(0, 1).map(repr)
    | st.sampled_from(["1e999", "\u0660.\u0665", "0x1p3"])
)
JUNK = st.sampled_from(
    ["", " ", "x", "True", "None", "é", "\udcff", "a\nb", "💥", "-", "--", "0" * 300]
)
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=6)
NAMES = st.lists(
    st.sampled_from(["full_update", "static_suffix", "dynamic_suffix", "full_update#2", " ", "é",
                     "dynamic_suffix+fused", "full_update+fused", "static_suffix#\n", "#", "+"]),
    max_size=4,
).map(",".join)  # fmt: skip
# Places below the test's own folder: a file, a folder, neither.
PLACES = ("data", "out", "json_out", "resume")
PLACE = st.sampled_from(["text.txt", "text.txt/below", "folder", "odd", "new/er", "", "é", "\udcff",
                         "a\nb", "n" * 250, "n" * 300, "p/" * 3000])  # fmt: skip


def value_of(name):
    """Values for a flag: sound ones, and those that somebody may give by mistake."""
    if name in SIZES:
        return SIZE
    if name in PLACES:
        return PLACE.map(lambda place: f"TMP/{place}")
    if name == "schedules":
        return NAMES
    if HINTS[name] is bool:
        return st.none()
    options = FIELDS[name].metadata.get("options", ())
    if HINTS[name] is str:
        return st.sampled_from([*options, "auto", "cuda:128", "mkldnn", "cpu:0", "é", "\udcff"])
    return WHOLE if HINTS[name] is int else REAL | WHOLE


@st.composite
def lines(draw):
    """A command line: one to five flags, any of them twice."""
    line = []
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=5)):
        value = draw(JUNK | WORDS if draw(st.integers(0, 14)) == 0 else value_of(name))
        flag = option(name)
        if HINTS[name] is bool and draw(st.booleans()):
            flag = "--no-" + flag.removeprefix("--")
        line.append(flag if value is None else f"{flag}={value}")
    return line


class BeganError(Exception):
    """The benchmark would train now."""


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    def all_(_self):
        raise BeganError

    monkeypatch.setattr(bench.run.Run, "all", all_)


def check(line, tiny):
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
        (Path(folder) / "folder").mkdir()
        (Path(folder) / "odd").mkdir()
        for name in ("text.txt", "odd/\udcff.txt"):
            (Path(folder) / name).write_text("some more words " * 50)
        out = ["--out", f"{folder}/out"]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = bench.run.main([*tiny, *out, *(a.replace("TMP", folder) for a in line)])
        except BeganError:
            return
        except SystemExit as error:  # argparse's own
            code = error.code
    if said.getvalue().startswith("usage: "):
        assert code == 2
        return
    errors = [each for each in said.getvalue().splitlines() if not each.startswith("warning: ")]
    assert (code, len(errors)) == (2, 1), errors
    assert errors[0].startswith("error: ")
    assert ": " in errors[0].removeprefix("error: "), "no remedy"


SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=250, derandomize=True, **SLOW)
@given(lines())
def test_any_line_is_run_or_refused(tiny, line):
    check(line, tiny)


@pytest.mark.soak
@settings(max_examples=10_000, **SLOW)
@given(lines())
def test_many_lines(tiny, line):
    check(line, tiny)
