"""Result files with damaged bytes: replayed, or exit status 2 and one line that names the file."""

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bench.run

ROOT = Path(__file__).parents[2]
WHOLE = (ROOT / "tests" / "data" / "recording_4090_staged_saliency.json").read_bytes()
PIECES = [
    b"{",
    b"}",
    b"[" * 2000,
    b'"',
    b",",
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\xff",
    b"-",
]


def cut(draw, content):
    return content[: draw(st.integers(0, len(content)))]


def flip(draw, content):
    at = draw(st.integers(0, len(content) - 1))
    return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]


def drop(draw, content):
    at, count = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 3000))
    return content[:at] + content[at + count :]


def insert(draw, content):
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.sampled_from(PIECES)) + content[at:]


def twice(draw, content):
    key = draw(st.sampled_from([b'"config"', b'"traces"', b'"steps"', b'"n_layers"']))
    return content.replace(b"{", b"{" + key + b": " + draw(st.sampled_from(PIECES)) + b",", 1)


def encode(draw, content):
    return content.decode().encode(draw(st.sampled_from(["utf-16", "utf-32-le", "cp037", "utf-7"])))


HARM = st.sampled_from([cut, flip, flip, drop, insert, twice, encode])


def check(data):
    content = WHOLE
    for harm in data.draw(st.lists(HARM, min_size=1, max_size=2)):
        content = harm(data.draw, content) if content.isascii() and content else content
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.json"
        path.write_bytes(content)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = bench.run.main(["--replay", str(path)])
    if code == 2:
        (line,) = said.getvalue().splitlines()
        assert line.startswith(f"error: {path} ")
        assert ": " in line.removeprefix("error: ")
    else:
        assert (code in (0, 1), said.getvalue()) == (True, "")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_bytes_are_replayed_or_refused(data):
    check(data)


@pytest.mark.soak
@settings(max_examples=5000, deadline=None)
@given(st.data())
def test_many_damaged_files(data):
    check(data)
