"""What the page of a study says: the verdict's sentence, what is no number, what cannot be said."""

import pytest

from bench.pages.study_numbers import between, change, listed_names, share
from bench.pages.study_words import limits, reasons, setup, task_lines, verdicts
from tests.pages.studies import CORNERS, study


def test_one_arm_that_wins_is_named_with_its_interval():
    (said,) = verdicts(study())
    assert said.startswith("text: grow wins against full_update, loss -2.96 % (")


def test_several_that_win():
    made = study(
        {"again": 0.0, **{f"good{i}": -0.05 - i / 1000 for i in range(5)}}, against=(), noise=1e-6
    )
    (said,) = verdicts(made)
    assert said == "text: good4, good3, good2 and 2 more win against full_update."


def test_neither_a_planted_arm_nor_the_null_wins():
    made = study({"again": 0.0, "slow": -0.05, "top4": 0.002})
    arms = made["tasks"]["text"]["arms"]
    arms["again"]["verdict"] = "WIN"
    assert arms["slow"]["verdict"] == "WIN"
    assert verdicts(made) == ["text: no arm wins against full_update."]
    assert "planted" in " ".join(task_lines(made, made["tasks"]["text"])).lower()


def test_a_search_judges_nothing_even_where_an_arm_has_the_word():
    made = study(confirms=[])
    (said,) = verdicts(made)
    assert "judges nothing" in said
    assert "win" not in said.lower()
    assert limits(made)[0].startswith("A search judges nothing")
    worse = verdicts(study({"top4": 0.05}, confirms=[]))[0]
    assert worse.endswith("no arm ended below full_update.")


def test_a_sentence_a_task_and_an_incomplete_study_says_so():
    made = study(tasks=("text", "finetune"), status="incomplete")
    assert [said.partition(":")[0] for said in verdicts(made)] == [
        "text, so far", "finetune, so far"
    ]  # fmt: skip
    assert verdicts(CORNERS["one cell"]()) == ["text, so far: nothing to compare with full_update."]
    assert any("incomplete" in line for line in limits(made))


def test_what_is_missing_is_counted():
    said = " ".join(limits(CORNERS["incomplete"]()))
    assert "top4 on text 8 and lisa on text 10" in said
    assert "2 versions of the code" in said
    assert "-dirty" in said


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (CORNERS["computed"](), "computed, not measured"),
        (CORNERS["two seeds"](), "2 seeds: a verdict needs 10."),
        (CORNERS["no null"](), "No null arm"),
        (CORNERS["failed"](), "lisa on text 10"),
        (study(), "One machine (a CPU)"),
        (study(), "8 blocks of width 128, 250 steps of full_update"),
        (study(), "Planted arms have a false clock"),
    ],
)
def test_limits(made, says):
    assert says in " ".join(limits(made))


def test_a_sound_confirmation_has_no_needless_reservations():
    said = " ".join(limits(study({"again": 0.0, "grow": -0.03})))
    for word in ("search", "computed", "a verdict needs", "noise", "Planted", "failed", "-dirty"):
        assert word not in said


def test_how_it_was_asked():
    said = " ".join(setup(study()))
    for words in ("Does growing the stack pay?", "confirms search-text", "10 seeds: 101, 102",
                  "+-1 %", "95 %", "the time that steps took"):  # fmt: skip
        assert words in said
    assert "It is a search." in " ".join(setup(study(confirms=[])))
    assert "computed cost" in " ".join(setup(CORNERS["computed"]()))


def test_every_arm_and_pair_has_its_reason():
    made = study()["tasks"]["text"]
    lines = reasons(made, "full_update")
    assert [line.partition(":")[0] for line in lines] == [
        "grow", "  against top4", "again", "top4", "lisa", "slow"
    ]  # fmt: skip
    assert all("The interval says" in line for line in lines)


def test_numbers_as_a_person_writes_them():
    assert [change(x) for x in (-0.0312, 0.0, 1e-7, -3e-6, 400.0)] == [
        "-3.12 %", "0 %", "+1.0e-05 %", "-3.0e-04 %", "+4e+04 %"
    ]  # fmt: skip
    assert between(-0.04, -0.02) == "-4.00 to -2.00 %"
    assert between(None, None) == "no interval"
    assert between(None, 0.01) == "below +1.00 %"
    assert between(0.0, None) == "above 0 %"
    assert share(0.812, "-") == "81.2 %"
    assert share(None, "not reached") == "not reached"
    assert listed_names(["a", "b"]) == "a and b"
    assert listed_names(["a"]) == "a"
