"""The command: what it writes, what it refuses, and that nothing is ever half-written."""

import json
import os
import subprocess
import sys

import pytest

from bench.report import beside, main
from bench.results import write
from tests.pages.cases import RECORDING, ROOT, result


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for seed, path in enumerate(paths):
        write(path, result(seed=seed))
    return paths


def test_a_page_beside_its_file(files, capsys):
    assert main([str(files[0])]) == 0
    page = files[0].with_suffix(".html")
    assert page.read_text().startswith("<!doctype html>")
    said = capsys.readouterr().out
    assert f"Written: {page}" in said
    assert "Keep dynamic_suffix" in said


def test_several_files_make_one_page(files, capsys):
    assert main([*map(str, files), str(RECORDING), "--html", str(files[0].parent / "c.html")]) == 0
    page = (files[0].parent / "c.html").read_text()
    assert "3 results side by side" in page
    assert not files[0].with_suffix(".html").exists()
    assert capsys.readouterr().out.count("dynamic_suffix") >= 3
    assert main([*map(str, files)]) == 0
    assert (files[0].parent / "comparison.html").exists()


def test_two_files_of_one_name_are_told_apart(files, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write(other / "a.json", result(seed=3))
    assert main([str(files[0]), str(other / "a.json")]) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert "a (2)" in page
    assert "a (2)" in capsys.readouterr().out


def test_where_a_page_goes(tmp_path):
    assert beside([tmp_path / "a.json"]) == tmp_path / "a.html"
    assert beside([tmp_path / "a"]) == tmp_path / "a.html"
    assert beside([tmp_path / "a.html"]) == tmp_path / "a.html.html"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON or is cut off"),
        (b"{", "is not JSON or is cut off"),
        (b"\xff\xfe", "is not"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "is not a result of bench/run.py: the file must be an object"),
        (b'{"script": "other"}', "its script is 'other'"),
        (b'{"script": "bench/run.py"}', "sha256"),
    ],
)
def test_no_result(content, says, tmp_path, files, capsys):
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)
    assert main([str(files[0]), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert str(bad) in error
    assert list(tmp_path.glob("*.html")) == []


def test_kernel_results_are_told_from_runs(capsys):
    assert main([str(ROOT / "bench" / "results" / "cpu-kernels.json")]) == 2
    assert "its script is 'bench/kernels.py'" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["missing/page.html", ".", "a.json"])
def test_a_page_that_cannot_be_written(where, files, tmp_path, capsys):
    before = files[0].read_bytes()
    assert main([str(files[0]), "--html", str(tmp_path / where)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert files[0].read_bytes() == before


def test_a_pipe_is_not_replaced(files, tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main([str(files[0]), "--html", str(pipe)]) == 2
    assert "no plain file" in capsys.readouterr().err
    assert pipe.is_fifo()


def test_a_full_disk_leaves_the_old_page(files, monkeypatch, capsys):
    page = files[0].with_suffix(".html")
    page.write_text("old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(files[0])]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert page.read_text() == "old"
    assert sorted(path.name for path in page.parent.iterdir()) == ["a.html", "a.json", "b.json"]


def test_the_same_file_gives_the_same_page(files):
    assert main([str(files[0])]) == 0
    page = files[0].with_suffix(".html")
    first = page.read_bytes()
    assert main([str(files[0])]) == 0
    assert page.read_bytes() == first


def test_plots_for_a_paper(files, tmp_path):
    assert main([str(files[0]), "--png", str(tmp_path / "plots")]) == 0
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png"}


def test_the_command_line(files):
    """As a user types it, from another folder."""
    line = [sys.executable, str(ROOT / "bench" / "report.py"), "a.json"]
    ran = subprocess.run(line, cwd=files[0].parent, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("Written: a.html\n")
    assert all(len(shown) <= 80 for shown in ran.stdout.splitlines())
    assert json.loads(files[0].read_text())["config"]["dmodel"] == 32
