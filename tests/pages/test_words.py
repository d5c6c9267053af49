"""What a report says: the verdict, what differs, what the evidence cannot say."""

import argparse
import shlex

import pytest

from bench.config import parser
from bench.pages import words
from bench.pages.evidence import evidence
from tests.pages.cases import CORNERS, result


def of(content: dict, name: str = "x"):
    return evidence(content, name)


def limits(**config) -> str:
    made = result()
    made["config"] |= config
    return "\n".join(words.limits(of(made)))


def test_a_run_that_did_not_end_has_no_result():
    assert words.headline(of(result()))[0].startswith("Keep dynamic_suffix")
    assert words.headline(of(result(status="interrupted")))[0] == (
        "No result: the run was interrupted before its end."
    )
    assert words.headline(of(result(status="running")))[0].startswith("No result: the run had not")
    assert "did not end" in "\n".join(words.limits(of(result(status="interrupted"))))
    assert "did not end" not in limits()


def test_a_schedule_that_failed_is_named():
    assert any("21 steps in a row" in line for line in words.headline(of(CORNERS["nulls"]())))


@pytest.mark.parametrize("lacking", ["speedup_vs_full", "elapsed_ms"])
def test_a_verdict_without_all_figures(lacking):
    made = result()
    for row in made["results"]:
        row[lacking] = None
    lines = words.headline(of(made))
    no_speed = lines == ["No verdict: how long the steps took was not recorded."]
    assert no_speed == (lacking == "speedup_vs_full")


def test_relevance_that_was_not_finite_needs_no_advice():
    made = result()
    made["results"][2]["final_val_loss"] = 9.0
    for event in made["traces"]["dynamic_suffix"]["dynamic_trace"]:
        if event.get("probe"):
            event["ema_scores"][0] = None
    assert any("The quality falls short" in line for line in words.headline(of(made)))


def test_limits_follow_the_settings():
    assert "equally many steps" not in limits()
    assert "equally many steps" in limits(equal_time_budget=False)
    assert "one after the other" not in limits()
    assert "one after the other" in limits(interleave=False)
    assert "One seed (7)" in limits()


def test_noise_is_that_of_the_run_repeated():
    assert "noise is unknown" in limits()
    made = result(names=("full_update", "full_update#2", "dynamic_suffix"))
    made["results"][0]["final_val_loss"], made["results"][1]["final_val_loss"] = 2.0, 2.05
    assert "differed by 2.50% in its final loss" in "\n".join(words.limits(of(made)))


def test_steps_that_cost_more_than_their_parts():
    made = result()
    assert "cost what their parts" not in "\n".join(words.limits(of(made)))
    made["results"][1]["measured_over_expected"] = 1.3
    assert "static_suffix 1.30" in "\n".join(words.limits(of(made)))


def test_what_was_not_recorded():
    assert "Not recorded" not in limits()
    made = result()
    for trace in made["traces"].values():
        del trace["val_trace"], trace["parts_ms"], trace["memory"]
    found = [line for line in words.limits(of(made)) if line.startswith("Not recorded")]
    assert len(found) == 3


def test_what_differs_between_files():
    one, two = result(), result()
    two["config"]["lr"] = 2e-3
    two["system"]["torch_version"] = "2.12.0"
    two["timestamp_utc"] = "2026-02-02T00:00:00Z"
    del two["config"]["accept_loss"]
    assert words.differences([of(one), of(two)]) == [
        ("lr", ["0.001", "0.002"]),
        ("accept_loss", ["0.01", words.UNTOLD]),
        ("torch version", ["2.13.0", "2.12.0"]),
    ]
    assert words.differences([of(one), of(one)]) == []


def test_what_cannot_be_compared():
    one = of(result())
    assert words.not_compared([one, one]) == []
    for change, says in (
        (lambda made: made["system"].update(torch_version="2.12.0"), "different machines"),
        (lambda made: made["config"].update(task="finetune"), "different tasks"),
        (lambda made: made["task"].update(corpus_sha256="1" * 64), "different tasks"),
        (lambda made: made["config"].update(seed=8), "Seeds differ"),
    ):
        made = result()
        change(made)
        (line,) = words.not_compared([one, of(made)])
        assert says in line


def flags_of(line: str) -> argparse.Namespace:
    program, script, *flags = shlex.split(line)
    assert (program, script) == ("python", "bench/run.py")
    return parser().parse_args(flags)


def test_the_command_that_repeats_a_run():
    assert words.command(of(result())) == "python bench/run.py --dmodel 32"
    made = result()
    del made["command"]
    flags = flags_of(words.command(of(made)))
    assert (flags.dmodel, flags.n_layers, flags.seed) == (32, 6, 7)
    original = CORNERS["the original's"]()
    flags = flags_of(words.command(of(original)))
    assert flags.task == "teacher"
    assert flags.dyn_relevance_metric == original["config"]["dyn_relevance_metric"]
    assert flags.dyn_adapt_budget is original["config"]["dyn_adapt_budget"]
