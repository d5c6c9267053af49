"""A study's file: what is refused, and what the command writes and says."""

import pytest

from bench.config import UserError
from bench.pages.study import load_study, study_page
from bench.report import main, write_study_page
from bench.results import write
from tests.pages.cases import result
from tests.pages.studies import CORNERS, study


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a-study.json"
    write(path, study())
    return path


@pytest.mark.parametrize("case", CORNERS)
def test_a_file_is_read_as_it_was_written(case, tmp_path):
    write(tmp_path / "a.json", CORNERS[case]())
    assert load_study(tmp_path / "a.json") == CORNERS[case]()


def put(content: dict, place: str, value: object) -> dict:
    """Another value at a place like tasks/text/arms."""
    *way, last = place.split("/")
    inner = content
    for key in way:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[last] = value
    return content


GROW = "tasks/text/arms/grow"


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("script", "bench/run.py", "its script is 'bench/run.py'"),
        ("status", "running", "status must be one of complete, incomplete, got 'running'"),
        ("clock", "sun", "clock must be one of time, cost"),
        ("question", None, "question must be text, got nothing"),
        ("null", 3, "null must be text"),
        ("seeds", [1, -2], "a seed must be 0"),
        ("confirms", [3], "a name of confirms must be text"),
        ("commits", "0123abc", "commits must be a list"),
        ("margin", 1.5, "margin must be between 0 and 1, got 1.5"),
        ("system", None, "system must be an object"),
        ("prices", 3, "prices must be an object"),
        ("tasks", [], "tasks must be an object"),
        ("baseline", "other", "the arms of task 'text' lack the baseline 'other'"),
        ("tasks/text/info", None, "info of task 'text'"),
        ("tasks/text/level", 0, "level of task 'text' must be between 0 and 1"),
        ("tasks/text/comparisons", -1, "comparisons of task 'text'"),
        (GROW, 3, "arm 'grow' must be an object"),
        (f"{GROW}/flags", [], "flags of 'grow', task 'text' must be an object"),
        (f"{GROW}/schedule", None, "schedule of 'grow', task 'text' must be text"),
        (f"{GROW}/verdict", "win", "the verdict of 'grow', task 'text' must be one of WIN"),
        (f"{GROW}/verdict", None, "got nothing"),
        (f"{GROW}/why", None, "why of 'grow', task 'text' must be text"),
        (f"{GROW}/planted", "x2", "planted of 'grow', task 'text' must be a finite number"),
        (f"{GROW}/loss", {"mean": "1", "low": 0, "high": 1}, "mean of loss of 'grow'"),
        (f"{GROW}/time/high", True, "high of time of 'grow', task 'text' must be a finite number"),
        (f"{GROW}/step/low", 10**400, "low of step of 'grow'"),
        (f"{GROW}/against/top4/verdict", "", "'grow', task 'text', against 'top4'"),
        (f"{GROW}/against", {"gone": {}}, "against 'gone': there is no such arm"),
        (f"{GROW}/cells/0/seed", 1.5, "seed in a cell of 'grow', task 'text'"),
        (f"{GROW}/cells/0/final_val_loss", "low", "final_val_loss in a cell"),
        (f"{GROW}/cells/0/budget_ms", 0, "budget_ms in a cell of 'grow', task 'text' must be"),
        (f"{GROW}/cells/0/failure", 1, "failure in a cell"),
        (f"{GROW}/cells/0/active_counts", [1.5], "active_counts of 'grow'"),
        (f"{GROW}/cells/0/val_trace", [[]], "val_trace of 'grow', task 'text' must be an object"),
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused_in_a_line(place, value, says, tmp_path):
    path = tmp_path / "a.json"
    write(path, put(study(), place, value))
    with pytest.raises(UserError) as caught:
        load_study(path)
    assert says in str(caught.value)
    assert "is not a result of bench/study.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(file):
    file.write_bytes(file.read_bytes().replace(b"grow", b"gros"))
    with pytest.raises(UserError, match="sha256"):
        load_study(file)


def test_a_page_beside_its_file_and_a_summary(file, capsys):
    assert main([str(file)]) == 0
    assert file.with_suffix(".html").read_text() == study_page(study())
    said = capsys.readouterr().out
    assert "grow" in said
    assert said.endswith(f"Written: {file.with_suffix('.html')}\n")


def test_the_page_elsewhere(file, tmp_path):
    assert main([str(file), "--html", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").exists()
    assert not file.with_suffix(".html").exists()
    assert write_study_page(file) == file.with_suffix(".html")
    assert file.with_suffix(".html").read_text() == (tmp_path / "b.html").read_text()


def test_a_study_and_other_results_do_not_mix(file, tmp_path, capsys):
    other = tmp_path / "run.json"
    write(other, result())
    for files in ([file, other], [other, file], [file, file]):
        assert main([*map(str, files)]) == 2
        assert capsys.readouterr().err == (
            "error: a study's result has a page of its own: give that file alone\n"
        )
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]


@pytest.mark.parametrize(
    ("more", "says"), [(["--png", "x"], "--png"), (["--html", "FILE"], "would replace")]
)
def test_what_a_study_cannot_do(more, says, file, capsys):
    before = file.read_bytes()
    assert main([str(file), *[str(file) if word == "FILE" else word for word in more]]) == 2
    assert says in capsys.readouterr().err
    assert file.read_bytes() == before


def test_names_obey_no_terminal(tmp_path, capsys):
    made = study({"grow\x1b[31m": -0.03}, against=())
    write(tmp_path / "a.json", made)
    assert main([str(tmp_path / "a.json")]) == 0
    assert "\x1b" not in capsys.readouterr().out
