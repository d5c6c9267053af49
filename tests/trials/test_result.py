"""The result of a study: its numbers computed again, what is missing, and what it prints."""

import dataclasses

import numpy as np
import pytest

from bench.results import read, write
from bench.trials.design import Cell
from bench.trials.result import document
from bench.trials.summary import lines
from tests.trials.made import ARMS, by_seed, cell, done, study

SEEDS = range(11, 21)
T = 3.249836  # of 9 degrees of freedom, 0.995 on one side, as tables have it


@pytest.fixture
def whole(tmp_path):
    """A confirmation in which top4 is better, grow faster but worse, and slow the same but slow."""
    return study(tmp_path, SEEDS), done(_arms())


def _arms() -> dict[str, dict]:
    drawn = np.random.default_rng(0)
    changes = {"full_update": (0.0, 10.0), "again": (0.0, 10.1), "top4": (-0.05, 6.0),
               "grow": (0.04, 5.0), "slow": (0.06, 20.0)}  # fmt: skip
    start = 3.0 * np.exp(drawn.normal(0, 0.02, 10))
    return {
        arm: by_seed((start * (1 + change) * np.exp(drawn.normal(0, 0.002, 10))).tolist(),
                     half=3.1, step_ms=step_ms)
        for arm, (change, step_ms) in changes.items()
    }  # fmt: skip


def made(whole, **changes):
    asked, cells = whole
    return document(dataclasses.replace(asked, **changes), cells, None)


def test_every_arm_gets_the_verdict_that_was_planted(whole):
    arms = made(whole)["tasks"]["text"]["arms"]
    assert {arm: about["verdict"] for arm, about in arms.items()} == {
        "full_update": None, "again": "NO_DIFFERENCE", "top4": "WIN", "grow": "FASTER_BUT_WORSE",
        "slow": "LOSS",
    }  # fmt: skip
    assert arms["top4"]["against"]["grow"]["verdict"] == "WIN"


def test_the_numbers_are_numpy_s(whole):
    task = made(whole)["tasks"]["text"]
    assert (task["comparisons"], task["level"]) == (5, pytest.approx(0.99))
    losses = {arm: np.array([c["final_val_loss"] for c in about["cells"]])
              for arm, about in task["arms"].items()}  # fmt: skip

    def expected(ours, theirs):
        logs = np.log(losses[ours]) - np.log(losses[theirs])
        half = T * np.std(logs, ddof=1) / np.sqrt(10)
        return [np.exp(logs.mean() + x) - 1 for x in (0, -half, half)]

    for arm in ARMS[1:]:
        about = task["arms"][arm]
        assert list(about["loss"].values()) == pytest.approx(expected(arm, "full_update"), rel=1e-5)
        steps = np.mean([c["mean_step_ms"] for c in about["cells"]]) / 10.0
        assert list(about["step"].values()) == pytest.approx([steps] * 3)
    rival = task["arms"]["top4"]["against"]["grow"]
    assert [rival[k] for k in ("mean", "low", "high")] == pytest.approx(
        expected("top4", "grow"), rel=1e-5
    )
    # From 3.1 after 500 ms on a line to the final loss after 1000; of 10, the greatest.
    base, ours = losses["full_update"], losses["top4"]
    shares = np.where(base >= 3.1, 5.0 - base, 0.5 + 0.5 * (3.1 - base) / (3.1 - ours))
    late = shares[base < 3.1]
    assert task["arms"]["top4"]["time"]["high"] == pytest.approx(late.max())
    assert task["arms"]["grow"]["time"] == {"median": None, "low": None, "high": None}


def test_it_says_what_was_asked_and_by_what(whole):
    asked, _ = whole
    content = made(whole)
    assert content["study"] == asked.path.read_text()
    assert content["command"] == f"python bench/study.py {asked.path} --clock time"
    assert (content["name"], content["confirms"]) == ("mine", ["search"])
    assert (content["status"], content["commits"]) == ("complete", ["abc"])
    assert content["seeds"] == list(SEEDS)
    task = content["tasks"]["text"]
    assert task["info"] == {"corpus": "made"}
    assert task["flags"]["lr"] == asked.config(Cell("text", "full_update", 11)).lr
    assert {arm: about["flags"] for arm, about in task["arms"].items()} == {arm: {} for arm in ARMS}
    assert [about["planted"] for about in task["arms"].values()] == [None] * 4 + [2.0]
    assert task["arms"]["top4"]["schedule"] == "static_suffix"


def test_an_arm_s_flags_are_those_in_which_it_differs(whole):
    asked, _ = whole
    top4 = dataclasses.replace(asked.arms["top4"], flags={"text": {"lr": 0.5}})
    content = made(whole, arms={**asked.arms, "top4": top4})
    assert content["tasks"]["text"]["arms"]["top4"]["flags"] == {"lr": 0.5}


def test_it_is_the_same_from_its_file(whole, tmp_path):
    content = made(whole)
    write(tmp_path / "result.json", content)
    assert read(tmp_path / "result.json") == content
    assert lines(read(tmp_path / "result.json")) == lines(content)


def test_the_order_in_which_cells_ended_changes_nothing(whole):
    asked, cells = whole
    for key, found in cells.items():
        found |= {"system": {"commit": str(key)}, "info": {"of": str(key)}, "notes": str(key)}
    turned = document(asked, dict(reversed(cells.items())), None)
    assert turned | {"timestamp_utc": ""} == made(whole) | {"timestamp_utc": ""}
    assert turned["tasks"]["text"]["info"] == {"of": str(Cell("text", "full_update", 11))}


def test_an_arm_that_failed_has_lost(whole, tmp_path):
    asked, cells = whole
    bad = cells[Cell("text", "top4", 14)]
    bad |= {"final_val_loss": None, "failure": "it diverged"}
    bad["val_trace"][-1]["val_loss"] = None
    content = document(asked, cells, None)
    top4 = content["tasks"]["text"]["arms"]["top4"]
    assert (top4["verdict"], len(top4["cells"][3]["val_trace"])) == ("LOSS", 2)
    assert top4["cells"][3]["failure"] == "it diverged"
    write(tmp_path / "result.json", content)
    assert read(tmp_path / "result.json") == content


def test_a_validation_that_was_not_finite_on_the_way_is_left_out(whole):
    asked, cells = whole
    for seed in SEEDS:
        cells[Cell("text", "top4", seed)]["val_trace"][1]["val_loss"] = None
    top4 = document(asked, cells, None)["tasks"]["text"]["arms"]["top4"]
    assert top4["verdict"] == "WIN"
    assert [point["step"] for point in top4["cells"][0]["val_trace"]] == [0, 100]


def test_seeds_on_which_the_baseline_failed_are_left_out(whole):
    asked, cells = whole
    cells[Cell("text", "full_update", 14)] |= {"final_val_loss": None, "failure": "it diverged"}
    top4 = document(asked, cells, None)["tasks"]["text"]["arms"]["top4"]
    assert top4["verdict"] == "INCONCLUSIVE"
    assert top4["why"].endswith(": better on 9 pairs; a WIN needs 10.")


def test_an_incomplete_study_says_what_it_can(whole):
    asked, cells = whole
    some = {key: found for key, found in cells.items() if key.arm != "top4" or key.seed < 15}
    content = document(asked, some, None)
    top4 = content["tasks"]["text"]["arms"]["top4"]
    assert content["status"] == "incomplete"
    assert [each["seed"] for each in top4["cells"]] == [11, 12, 13, 14]
    assert top4["why"].endswith(": not certainly earlier.")
    nothing = document(asked, {}, None)["tasks"]["text"]
    assert nothing["info"] == {}
    assert document(dataclasses.replace(asked, null=None), {}, None)["tasks"]["text"] == nothing
    assert nothing["arms"]["top4"]["why"] == "An interval needs 2 pairs of seeds, got 0."
    assert nothing["arms"]["top4"]["against"]["grow"]["mean"] is None
    assert lines(document(asked, {}, None))[-2].startswith("Incomplete")


def test_without_a_null_arm_it_says_so(whole):
    arms = made(whole, null=None)["tasks"]["text"]["arms"]
    assert arms["top4"]["verdict"] == "WIN"
    assert arms["top4"]["why"].endswith("No null arm shows how large the noise is.")


def test_the_null_arm_is_the_floor_of_the_others_and_not_its_own(whole):
    asked, cells = whole
    for seed in SEEDS:
        found = cells[Cell("text", "again", seed)]
        cells[Cell("text", "again", seed)] = found | cell(seed, 0.94 * found["final_val_loss"], 3.0)
    arms = document(asked, cells, None)["tasks"]["text"]["arms"]
    assert (arms["again"]["verdict"], arms["top4"]["verdict"]) == ("WIN", "INCONCLUSIVE")
    assert "On text the null arm" in lines(document(asked, cells, None))[-1]


def test_it_prints_every_arm_the_best_first_and_the_planted_one_marked(whole):
    printed = lines(made(whole))
    table = [line.split()[0] for line in printed[2:7]]
    assert table == ["top4", *sorted(ARMS[:2], key=lambda arm: table.index(arm)), "grow", "slow"]
    assert printed[0].startswith("text: against full_update, which ends at ")
    assert printed[0].endswith("5 comparisons, each interval at 99.00%")
    assert sum("slow (planted: time x 2)" in line for line in printed) == 2
    for arm in ARMS[1:]:
        assert any(line.startswith(f"{arm}") and ". At equal time" in line for line in printed)
    assert any(line.startswith("top4 against grow: WIN. ") for line in printed)
    assert any(line.startswith("grow") and "never" in line for line in printed[2:7])
    assert printed[-1] == ""


def test_it_ends_with_what_cannot_be_said(whole):
    asked, cells = whole
    content = made(whole, confirms=(), clock="cost")
    assert [line.partition(":")[0] for line in lines(content)[-2:]] == [
        "A search", "The clock is computed, not measured",
    ]  # fmt: skip
    del cells[Cell("text", "slow", 20)]
    cells[Cell("text", "slow", 19)]["system"] = {"commit": "def-dirty"}
    content = document(asked, cells, None)
    assert content["commits"] == ["abc", "def-dirty"]
    assert lines(content)[-3:] == [
        "Incomplete: cells are missing, and what is said may change.",
        "Its cells were run by 2 commits: abc, def-dirty.",
        "Some of its code was not committed: nobody else has what ran.",
    ]
