"""A study file: what it says is what is run, and what cannot be run is refused in a line."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.config import UserError
from bench.trials.arms import Cell, Study
from bench.trials.design import load

ROOT = Path(__file__).resolve().parents[2]
SOUND = """
question = "Does it pay?"
clock = "cost"
seeds = [3, 4]
null = "again"
[flags]
preset = "seed"
device = "cpu"
dtype = "float32"
lr = 1e-4
steps = 20
[tasks.text]
[tasks.short]
task = "text"
steps = 10
[arms.full_update]
[arms.again]
schedule = "full_update"
[arms.top4]
schedule = "static_suffix"
static_active_layers = 4
against = ["grow"]
[arms.grow]
text = { grow_window = 3 }
"""


def study(folder: Path, text: str = SOUND, name: str = "mine.toml", **given: str) -> Study:
    path = folder / name
    path.write_text(text)
    return load(path, **given)


def refusal(folder: Path, text: str, **given: str) -> str:
    """What is said of a study that cannot be used: a line that begins with the file."""
    with pytest.raises(UserError) as caught:
        study(folder, text, **given)
    said = str(caught.value)
    assert said.startswith(str(folder / "mine.toml"))
    assert "\n" not in said
    return said.removeprefix(str(folder / "mine.toml"))


def test_what_the_file_says(tmp_path):
    made = study(tmp_path)
    assert (made.name, made.question, made.clock) == ("mine", "Does it pay?", "cost")
    assert (made.seeds, made.baseline, made.null) == ((3, 4), "full_update", "again")
    assert (made.margin, made.confidence, made.confirms) == (0.01, 0.95, ())
    assert made.arms["top4"].against == ("grow",)
    assert [tuple(cell) for cell in made.cells()][:5] == [
        ("text", "full_update", 3), ("text", "again", 3), ("text", "top4", 3), ("text", "grow", 3),
        ("short", "full_update", 3),
    ]  # fmt: skip
    assert len(made.cells()) == len(set(made.cells())) == 16
    assert study(tmp_path, clock="time").clock == "time"


def test_the_flags_of_a_cell_by_strength(tmp_path):
    """An arm's on a task, an arm's, a task's, all tasks'; then the preset's."""
    made = study(tmp_path, SOUND + "[arms.own]\nschedule = 'grow'\nsteps = 30\nshort.steps = 40\n")

    def steps(task: str, arm: str) -> int:
        return made.config(Cell(task, arm, 3)).steps

    assert steps("short", "own") == 40
    assert steps("text", "own") == 30
    assert steps("short", "grow") == 10
    assert steps("text", "grow") == 20
    config = made.config(Cell("text", "top4", 4))
    assert (config.seed, config.lr, config.static_active_layers) == (4, 1e-4, 4)
    assert (config.schedules, config.task) == ("static_suffix", "text")
    assert config.batch_size == 8  # the preset's
    assert not config.equal_time_budget
    assert not config.interleave
    assert made.config(Cell("text", "grow", 3)).grow_window == 3
    assert made.config(Cell("short", "grow", 3)).grow_window != 3


def test_an_arm_of_some_tasks(tmp_path):
    made = study(tmp_path, SOUND + "[arms.own]\nschedule = 'grow'\ntasks = ['short']\n")
    assert made.arms_of("text") == ["full_update", "again", "top4", "grow"]
    assert made.arms_of("short") == ["full_update", "again", "top4", "grow", "own"]


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "studies").glob("*.toml")), ids=str)
def test_the_studies_that_are_here(path):
    assert load(path).cells()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 1e-4", "learning_rate = 1e-4", "flags: learning_rate is no flag"),
        ("lr = 1e-4", "step = 3", "flags: step is no flag: did you mean steps?"),
        ("steps = 10", "static_activ_layers = 3", "tasks.short: static_activ_layers is no flag: "
                                                 "did you mean static_active_layers?"),
        ("grow_window = 3", "grow_windw = 3", "arms.grow.text: grow_windw is no flag"),
        ("steps = 10", "seed = 10", "tasks.short: seed is the study's to set"),
        ("lr = 1e-4", "out = 'x'", "flags: out is the study's to set"),
        ("lr = 1e-4", "resume = 'x'", "flags: resume is the study's to set"),
        ("lr = 1e-4", "lr = 'x'", "--lr must be a finite number"),
        ("lr = 1e-4", "lr = nan", "--lr must be a finite number"),
        ("lr = 1e-4", "lr = -inf", "--lr must be a finite number"),
        ("lr = 1e-4", "lr = true", "--lr must be a finite number"),
        ("lr = 1e-4", "lr = 0", "--lr must be > 0"),
        ("steps = 20", "steps = 2.5", "--steps must be a whole number"),
        ('device = "cpu"', "device = 5", "flags: device must be text, got 5"),
        ('device = "cpu"', "device = 'tpu'", "--device must be auto, cpu"),
        ("lr = 1e-4", "data = ['x']", "flags: data must be text, got ['x']"),
        ("lr = 1e-4", "data = 1979-05-27", "flags: data must be text"),
        ("seeds = [3, 4]", "seeds = 3", "seeds must be a list, got 3"),
        ("seeds = [3, 4]", "seeds = [3.0]", "seeds must be a list of whole numbers"),
        ("seeds = [3, 4]", "seeds = [true]", "seeds must be a list of whole numbers"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "seeds names one twice, got [3, 3]"),
        ("seeds = [3, 4]", "seeds = [-1]", "seeds must be 0 to 2**31 - 1, got -1"),
        ("seeds = [3, 4]", "seeds = [2147483648]", "seeds must be 0 to 2**31 - 1"),
        ("seeds = [3, 4]", "seeds = []", "there must be seeds, got none"),
        ("seeds = [3, 4]", "", "there must be seeds, got none"),
        ("seeds = [3, 4]", f"seeds = [0x{'f' * 6000}]", "of more than 64 bits"),
        ("seeds = [3, 4]", f"seeds = [{'9' * 6000}]", "is not TOML"),
        ("seeds = [3, 4]", f"seeds = {'[' * 3000}", "nested too deeply"),
        ("seeds = [3, 4]", "seeds = [3, 4", "is not TOML"),
        ("seeds = [3, 4]", "seeds = [3, 4]\nseeds = [5]", "is not TOML"),
        ('clock = "cost"', 'clock = "noon"', "clock must be one of time, cost, got 'noon'"),
        ('clock = "cost"', "clock = 5", "clock must be text, got 5"),
        ('question = "Does it pay?"', "question = []", "question must be text"),
        ('question = "Does it pay?"', "reason = 'x'", "reason is not known here: there are flags"),
        ('null = "again"', 'null = "top4"', "null must be another arm that does what"),
        ('null = "again"', 'null = "full_update"', "null must be another arm that does what"),
        ('null = "again"', 'null = "none"', "'none' is not among the arms full_update, again"),
        ('null = "again"', "null = false", "null must be text, got False"),
        ('null = "again"', 'baseline = "all"', "'all' is not among the arms"),
        ('null = "again"', "baseline = ''", "'' is not among the arms"),
        ('null = "again"', "margin = 0", "margin and confidence must be between 0 and 1"),
        ('null = "again"', "margin = nan", "margin and confidence must be between 0 and 1"),
        ('null = "again"', "confidence = 1", "margin and confidence must be between 0 and 1"),
        ('null = "again"', "margin = true", "margin must be a number, got True"),
        ('null = "again"', "margin = '1'", "margin must be a number, got '1'"),
        ('against = ["grow"]', 'against = ["shrink"]', "'shrink' is not among the arms"),
        ('against = ["grow"]', 'against = ["top4"]', "arms.top4: against must name other arms"),
        ('against = ["grow"]', 'against = ["grow", "grow"]', "against names one twice"),
        ('against = ["grow"]', 'against = "grow"', "against must be a list"),
        ("[arms.grow]", "[arms.grow]\ntasks = ['text']", "judged against grow, which does not run"),
        ("[arms.again]", "[arms.again]\ntasks = ['text']", "arms.again has to run on all tasks"),
        ("[arms.full_update]", "[arms.full_update]\ntasks = ['text']", "has to run on all tasks"),
        ("[arms.grow]", "[arms.grow]\ntasks = ['test']", "tasks names test, which is not among"),
        ("[arms.again]", "[arms.again]\nlr = 1e-3", "null must be another arm that does what"),
        ("[arms.again]", "[arms.again]\ntime_factor = 2", "null must be another arm that does"),
        ("[arms.grow]", "[arms.grow]\ntime_factor = 0", "time_factor must be between"),
        ("[arms.grow]", "[arms.grow]\ntime_factor = -1.0", "time_factor must be between"),
        ("[arms.grow]", "[arms.grow]\ntime_factor = nan", "time_factor must be between"),
        ("[arms.grow]", "[arms.grow]\ntime_factor = inf", "time_factor must be between"),
        ("[arms.grow]", "[arms.grow]\ntime_factor = 'x'", "time_factor must be a number"),
        ("[arms.grow]", "[arms.grows]", "is not among the arms"),
        ("[arms.grow]\n", "[arms.grow]\nschedule = 'grows'\n", "unknown schedule 'grows'"),
        ("[arms.grow]\n", "[arms.grow]\nschedule = 'grow,cyclic'\n", "unknown schedule"),
        ("[arms.grow]\n", "[arms.grow]\nschedule = 'lora'\n", "lora has no computed cost"),
        ("static_active_layers = 4", "static_active_layers = 40", "40 is outside 1..18"),
        ("static_active_layers = 4", "batch_size = 4", "arms must be validated on the same"),
        ("static_active_layers = 4", "seq_len = 512", "arms must be validated on the same"),
        ("static_active_layers = 4", "task = 'teacher'", "arms must be validated on the same"),
        ("static_active_layers = 4", "data = 'x'", "arms must be validated on the same"),
        ("[arms.top4]", "[arms.'../top4']", "arms must be named with up to 80 letters"),
        ("[arms.top4]", f"[arms.{'n' * 300}]", "arms must be named with up to 80 letters"),
        ("[tasks.short]", "[tasks.text-short]", "tasks must be named without -"),
        ("[tasks.short]", "[tasks.short]\nwho = 3\n", "tasks.short: who is no flag"),
        ("[tasks.text]\n[tasks.short]", "[tasks]\ntext = 1\n[tasks.short]", "text must be a table"),
        ("[tasks.short]", "[tasks.short]\ntask = 'short'\n[tasks.more]", "--task must be one of"),
    ],
)  # fmt: skip
def test_refused(old, new, said, tmp_path):
    assert old in SOUND
    assert said in refusal(tmp_path, SOUND.replace(old, new, 1))


def test_another_batch_size_on_the_same_text(tmp_path):
    arm = "[arms.half]\nschedule = 'full_update'\nbatch_size = 4\nval_batches = 8\n"
    made = study(tmp_path, SOUND + arm)
    one, two = (made.config(Cell("text", arm, 3)) for arm in ("half", "full_update"))
    assert one.batch_size * one.val_batches == two.batch_size * two.val_batches


def test_the_clock_asked_for_is_the_one_that_is_checked(tmp_path):
    lora = SOUND.replace('clock = "cost"', "") + "[arms.lora]\n"
    assert study(tmp_path, lora).clock == "time"
    assert "lora has no computed cost" in refusal(tmp_path, lora, clock="cost")


def test_files_that_are_none(tmp_path):
    (tmp_path / "latin.toml").write_bytes('question = "\xe9"'.encode("latin-1"))
    for name, said in {
        "none.toml": "No such file",
        ".": "Is a directory",
        "latin.toml": "is not TOML",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


SEEDS = "seeds = [3, 4]"
TEN = f"seeds = {[*range(10, 20)]}\nconfirms = ['search.toml']"


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (TEN, None),
        (TEN.replace("19]", "3]"), "the seeds 3 were already used by"),
        (TEN.replace(", 19]", "]"), "a confirmation needs 10 seeds or more, got 9"),
        (TEN.replace("search.toml", "lost.toml"), "lost.toml cannot be read"),
        (TEN.replace("search.toml", "mine.toml"), "which confirms others itself"),
        (TEN.replace("search.toml", ""), "cannot be read (Is a directory)"),
        (TEN.replace("'search.toml'", "5"), "confirms must be a list of texts"),
        (TEN.replace("'search.toml'", "'search.toml', 'search.toml'"), "names one twice"),
        (TEN.replace("search.toml", "bad.toml"), "there must be seeds"),
    ],
)
def test_a_confirmation(new, said, tmp_path):
    (tmp_path / "search.toml").write_text(SOUND)
    (tmp_path / "bad.toml").write_text(SOUND.replace(SEEDS, ""))
    text = SOUND.replace(SEEDS, new)
    if said is None:
        assert study(tmp_path, text).confirms == (tmp_path / "search.toml",)
        for without in ("", 'null = ""'):
            assert "needs `null`" in refusal(tmp_path, text.replace('null = "again"', without))
    else:
        with pytest.raises(UserError) as caught:
            study(tmp_path, text)
        assert said in str(caught.value)


JUNK = st.sampled_from(
    ["", "=", "[", "]", "'", '"', "\n", "[[", "{}", "1e999", "nan", "true", "-1", "\0", "\ud800",
     "[flags]", "[arms.x]", "0x" + "f" * 5000, "9" * 5000, "1979-05-27", "'full_update'", "lr"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(SOUND)), st.integers(0, 12), JUNK), max_size=4))
@example([(SOUND.index("3, 4"), 4, "nan")])
def test_any_damage(changes):
    text = SOUND
    for place, length, junk in changes:
        text = text[:place] + junk + text[place + length :]
    check(text.encode(errors="surrogatepass"))


def check(content: bytes) -> None:
    """A study whose cells all have flags, or an error that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.toml"
        path.write_bytes(content)
        try:
            made = load(path)
        except UserError as error:
            said = str(error)
        else:
            said = folder if all(made.config(cell).steps > 0 for cell in made.cells()) else ""
    assert folder in said


TOML = ["question", "clock", "seeds", "baseline", "null", "margin", "confidence", "confirms"]
VALUES = ["nan", "inf", "true", "''", "'again'", "[]", "[[]]", "[1, 'x']", "{}", "{ a = 1 }", "0",
          "-1", "0.5", "1979-05-27", "07:32:00", "['.']", "[{}]", "'time'", "[1, 1.0]"]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*TOML, "flags", "tasks", "arms"]), st.sampled_from(VALUES))
def test_any_value_for_any_key(key, value):
    lines = [line for line in SOUND.splitlines() if not line.startswith(f"{key} =")]
    lines = [line for line in lines if not line.startswith(f"[{key}")]
    check("\n".join([f"{key} = {value}", *lines]).encode())
