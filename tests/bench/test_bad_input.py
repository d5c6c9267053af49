"""Bad input: exit 2, one line with the rule, the value and the remedy, before any training."""

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bench.run
from bench.config import UserError, parser, resolve

BAD = [
    ("--schedules full_update,magic", ["--schedules", "'magic'", "choose"]),
    ("--schedules static_suffix,full_update,static_suffix", ["static_suffix twice", "#2"]),
    ("--schedules ,", ["--schedules", "none", "--help"]),
    ("--dmodel 15", ["--dmodel", "15", "--n-heads"]),
    ("--dmodel 24 --n-heads 5", ["--dmodel", "24", "--n-heads"]),
    ("--data TMP/nowhere", ["--data", "nowhere", "give"]),
    ("--data TMP/empty", ["--data", "empty", "give"]),
    ("--data TMP/hollow", ["--data", "hollow", "give"]),
    ("--data TMP/short.txt", ["--data", "short.txt", "17", "--seq-len"]),
    ("--device cuda:9", ["--device", "cuda:9", "choose"]),
    ("--device nonsense", ["--device", "nonsense", "choose"]),
    ("--device meta", ["--device", "meta", "choose"]),
    ("--device cpu:3", ["--device", "cpu:3", "choose"]),
    ("--json-out TMP/short.txt/deep/r.json", ["--json-out", "short.txt", "choose another"]),
    ("--out TMP/short.txt", ["--out", "short.txt", "choose another"]),
    ("--json-out TMP/empty", ["--json-out", "empty", "folder", "choose another"]),
    ("--json-out /dev/null", ["--json-out", "/dev/null", "device", "choose another"]),
    (f"--json-out TMP/{'n' * 250}", ["--json-out", "too long", "choose another"]),
    ("--device mkldnn", ["--device", "mkldnn", "choose"]),
    ("--out=--", ["--out", "--", "give"]),
    ("--replay=--", ["--replay", "--", "give"]),
    ("--n-layers 10001", ["--n-layers", "10001", "give"]),
    ("--dmodel 10000000", ["--n-layers x --dmodel", "1600000000000000", "lower"]),
    ("--batch-size 9000000000", ["--batch-size", "9216000000000", "lower"]),
    ("--val-batches 90000000000", ["--val-batches", "2880000000000", "lower"]),
    ("--dyn-stability-window 9007199254740993", ["--dyn-stability-window", "at most", "give"]),
    ("--task other", ["--task", "'other'", "teacher"]),
    ("--dtype float16", ["--dtype", "'float16'", "bfloat16"]),
    ("--preset huge", ["--preset", "'huge'", "small"]),
    ("--dyn-relevance-metric vibes", ["--dyn-relevance-metric", "'vibes'", "grad_ratio"]),
    ("--dyn-final-recovery-mode both", ["--dyn-final-recovery-mode", "'both'", "staged"]),
    ("--lr 0", ["--lr", "0.0", "give"]),
    ("--lr nan", ["--lr", "nan", "give"]),
    ("--lr inf", ["--lr", "inf", "give"]),
    ("--weight-decay -1", ["--weight-decay", "-1.0", "give"]),
    ("--seed -1", ["--seed", "-1", "give"]),
    ("--max-steps-multiplier 0.5", ["--max-steps-multiplier", "0.5", "give"]),
    ("--warmup-ignore-steps -1", ["--warmup-ignore-steps", "-1", "give"]),
    ("--dyn-relevance-threshold 0", ["--dyn-relevance-threshold", "0.0", "give"]),
    ("--dyn-relevance-threshold 1.5", ["--dyn-relevance-threshold", "1.5", "give"]),
    ("--dyn-final-recovery-stage1-progress nan", ["stage1-progress", "nan", "give"]),
    ("--dyn-loss-lower 1.1", ["--dyn-loss-lower", "--dyn-loss-upper", "1.1", "raise"]),
    ("--time-budget-ms 0", ["--time-budget-ms", "0.0", "give"]),
    ("--time-budget-ms 5 --no-equal-time-budget", ["--time-budget-ms", "--equal-time-budget"]),
    ("--equal-time-budget --schedules static_suffix", ["full_update", "--time-budget-ms"]),
    *[
        (f"--{flag} {value}", [f"--{flag}", value, "give"])
        for flag, value in [
            *[(f"dyn-{name}-decay", "1.0") for name in ("ema", "loss-ema")],
            *[
                (name, "0")
                for name in (
                    "steps", "dmodel", "n-layers", "hidden-mult", "batch-size", "seq-len",
                    "val-batches", "dyn-stability-window", "dyn-budget-step-up",
                    "dyn-budget-step-down",
                )
            ],
            *[(f"dyn-{name}", "-1") for name in ("warmup-steps", "probe-every", "refresh-every")],
            *[(f"dyn-{name}", "-0.5") for name in ("eps", "stability-cv", "freeze-start-frac")],
            ("dyn-final-full-frac", "1.5"),
            ("dyn-stability-rel-change", "-0.1"),
            ("teacher-noise", "-0.1"),
        ]
    ],
]  # fmt: skip
WHOLE = {
    "config": {"n_layers": 3, "steps": 2, "equal_time_budget": True, "time_budget_ms": 9.0},
    "traces": {
        "full_update": {
            "step_times_ms": [5.0, 5.0], "train_losses": [1.0, 1.0], "active_layers_hist": [3, 3]
        },
        "dynamic_suffix": {
            "step_times_ms": [5.0], "train_losses": [1.0], "active_layers_hist": [3],
            "dynamic_trace": [{"step": 0, "probe": True, "ema_scores": [0.1, 0.1, 0.1]}],
        },
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    def all_(_self):
        pytest.fail("training began")

    monkeypatch.setattr(bench.run.Run, "all", all_)


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "nothing.txt").touch()
    (tmp_path / "short.txt").write_text("brief " * 6)
    return tmp_path


def refusal(capsys, argv: list[str]) -> str:
    """The one line with which these arguments are refused; argparse may exit by itself."""
    code = status(lambda: bench.run.main(argv))
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    if lines[0].startswith("usage:"):
        return lines[-1]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def status(run) -> int:
    """Its exit status, whether returned or raised by argparse."""
    try:
        return run()
    except SystemExit as error:
        return int(error.code)


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_refused_before_any_work(line, words, place, tiny, capsys):
    before = sorted(place.rglob("*"))
    out = [] if "--out" in line else ["--out", str(place / "out")]
    said = refusal(capsys, [*tiny, *out, *line.replace("TMP", str(place)).split()])
    for word in words:
        assert word in said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("line", ["--no-such-flag 1", "--steps many", "--lr", "--steps 1.5"])
def test_argparse_refuses(line, place, capsys):
    said = refusal(capsys, ["--out", str(place / "out"), *line.split()])
    assert line.split()[0] in said
    assert not (place / "out").exists()


REPLAYS = {
    "text.json": (b"not json", "not JSON"),
    "cut.json": (json.dumps(WHOLE).encode()[:-40], "cut off"),
    "none.json": (b"", "cut off"),
    "bytes.json": (b"\xff\xfe\x00", "not text"),
    "bare.json": (json.dumps({"config": WHOLE["config"]}).encode(), "traces"),
    "no_traces.json": (json.dumps(WHOLE | {"traces": {}}).encode(), "traces"),
    "list.json": (b"[1, 2]", "not a result file"),
    "number.json": (b"7", "not a result file"),
    "uneven.json": (json.dumps(WHOLE).replace("[5.0, 5.0]", "[5.0]", 1).encode(), "cut off"),
}


@pytest.mark.parametrize("name", [*REPLAYS, "deep.json"])
def test_replay_refuses(name, tmp_path, capsys):
    content, word = REPLAYS.get(name, (b"[" * 100_000, "nested"))
    (tmp_path / name).write_bytes(content)
    said = refusal(capsys, ["--replay", str(tmp_path / name)])
    assert name in said
    assert word in said


def test_replay_of_nothing(tmp_path, capsys):
    assert "gone.json" in refusal(capsys, ["--replay", str(tmp_path / "gone.json")])
    assert str(tmp_path) in refusal(capsys, ["--replay", str(tmp_path)])


def test_a_name_in_two_lines_is_refused_in_one(tmp_path, capsys):
    assert "o ne.json" in refusal(capsys, ["--replay", str(tmp_path / "o\nne.json")])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_replay_reads_other_encodings(encoding, tmp_path):
    (tmp_path / "r.json").write_bytes(json.dumps(WHOLE).encode(encoding))
    assert bench.run.main(["--replay", str(tmp_path / "r.json")]) == 0


def test_names_that_are_not_text_can_be_shown(tmp_path):
    path = tmp_path / "\udcff.json"
    path.write_text(json.dumps(WHOLE))
    command = [sys.executable, bench.run.__file__, "--replay", path]
    shown = subprocess.run(command, capture_output=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert b"\\udcff.json: 3 steps" in shown.stdout


NUMERIC = [a.option_strings[0] for a in parser()._actions if a.type in (int, float)]
VALUES = st.one_of(
    st.integers(-3, 5), st.integers(), st.floats(), st.sampled_from(["", "x", "1e999", "-0"])
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NUMERIC), VALUES, min_size=1, max_size=3))
def test_any_number_resolves_or_is_refused(values):
    argv = [f"{flag}={value}" for flag, value in values.items()]

    def try_them() -> int:
        flags = vars(parser().parse_args(["--device", "cpu", "--task", "teacher", *argv]))
        try:
            config = resolve({k: v for k, v in flags.items() if v is not None})
        except UserError as error:
            return 2 if "\n" not in str(error) else 1
        return int(not all(map(math.isfinite, (config.lr, config.dyn_eps, config.accept_loss))))

    with contextlib.redirect_stderr(io.StringIO()):
        assert status(try_them) in (0, 2)


JUNK = [None, True, -1, 0, 2.5, float("inf"), float("nan"), "x", [], [1], {}, [None], [[1]]]
JUNK += [10**400, [10**400]]
SPOILT = [("config", key) for key in [
    *WHOLE["config"], "dyn_probe_every", "dyn_ema_decay", "dyn_eps",
    "dyn_max_active_layers", "dyn_final_recovery_mode", "dyn_adapt_budget",
]]  # fmt: skip
SPOILT += [("traces", name, key) for name, trace in WHOLE["traces"].items() for key in trace]
SPOILT += [("traces", "dynamic_suffix", "dynamic_trace", 0, key) for key in ("step", "ema_scores")]


SPOILT.append(("config", "max_steps_multiplier"))


@pytest.mark.parametrize("where", SPOILT, ids=lambda where: ".".join(map(str, where)))
def test_a_spoilt_recording_never_gives_a_traceback(where, tmp_path):
    path = tmp_path / "r.json"
    for junk in JUNK:
        spoilt = json.loads(json.dumps(WHOLE))
        owner = spoilt
        for key in where[:-1]:
            owner = owner[key]
        owner[where[-1]] = junk
        path.write_text(json.dumps(spoilt))
        assert bench.run.main(["--replay", str(path)]) in (0, 1, 2), junk
