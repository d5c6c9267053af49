"""A run in sentences: their numbers are the run's."""

import pytest

from bench.pages.evidence import load
from bench.pages.story import story
from tests.pages.cases import RECORDING
from tests.pages.runs import run_of


def told(made) -> list[str]:
    return story(made, made.runs[-1])


def test_the_original_experiment():
    assert told(load(RECORDING)) == [
        "It took 1,206 steps.",
        "14.4 of 18 blocks trained on average of all steps.",
        "Freezing began at step 364, after 30.2 % of the steps and 35.0 % of their time; from "
        "there to step 1069 on average 12.2 of 18 blocks trained (12.0 in the steps that were no "
        "probes).",
        "83 steps measured how much each block matters (probes): 54 before freezing began, 29 from "
        "then on.",
        "The recovery at the end began at step 1070, after 88.7 % of the steps and 88.0 % of their "
        "time: stage 1 from step 1070 on, stage 2 from step 1120 on, all blocks from step 1164 on.",
    ]


@pytest.mark.parametrize(
    ("made", "sentences"),
    [
        (
            run_of(1, [{0}]),
            ["It took 1 step.", "Every block trained in every step: none was ever frozen."],
        ),
        (
            run_of(4, [{2, 3}] * 3),
            ["It took 3 steps.", "Blocks 2-3 trained in every step; blocks 0-1 never did."],
        ),
        (
            run_of(4, [{1, 3}, {3}], probes=[1]),
            [
                "It took 2 steps.",
                "1.5 of 4 blocks trained on average of all steps.",
                "Blocks 0, 2 never trained.",
                "1 step measured how much each block matters (probes).",
            ],
        ),
        (run_of(4, []), []),
    ],
)
def test_corners(made, sentences):
    assert told(made) == sentences


def test_freezing_without_probes_or_recovery():
    made = run_of(2, [{0, 1}, {1}, {1}, {1}], events=[{"step": 1, "freeze_trigger": {}}])
    assert told(made)[2:] == [
        "Freezing began at step 1, after 25.0 % of the steps and 25.0 % of their time; from there "
        "to step 3 on average 1.0 of 2 blocks trained."
    ]
    made.runs[0].step_ms[2] = None
    assert "after 25.0 % of the steps; from" in told(made)[2]


def test_freezing_only_at_the_recovery():
    events = [{"step": 2, "freeze_trigger": {}}, {"step": 2, "final_recovery_stage": "full"}]
    found = told(run_of(2, [{0, 1}] * 4, events=events))
    assert found[2].endswith(", together with the recovery.")
    assert found[3].endswith(": all blocks from step 2 on.")


def test_what_lies_beyond_the_end_did_not_happen():
    events = [{"step": 9, "freeze_trigger": {}}, {"step": 9, "final_recovery_stage": "full"}]
    assert len(told(run_of(2, [{0, 1}] * 4, events=events))) == 2


@pytest.mark.parametrize(
    ("running", "says"),
    [
        ([], None),
        ([(0, range(8))], None),
        ([(0, [0, 1])], "Only 2 blocks (0-1) ran."),
        (
            [(0, [0]), (2, [0, 1, 4]), (5, range(8))],
            "1 block (0) ran until step 1, 3 blocks (0-1, 4) ran until step 4, then all 8.",
        ),
        ([(0, range(8)), (4, [0, 7])], "All 8 ran until step 3, then 2 blocks (0, 7)."),
        ([(t, range(1 + t)) for t in range(8)] + [(8, [0]), (90, range(8))],
         "1 to 8 of 8 blocks ran, 3.8 on average of all steps."),
    ],
)  # fmt: skip
def test_which_blocks_ran(running, says):
    found = told(run_of(8, [{0}] * 10, running=running))
    assert [line for line in found if " ran" in line] == ([says] if says else [])
