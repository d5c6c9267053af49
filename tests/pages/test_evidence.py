"""What is a result file and what is not: refused in a line, or read."""

import copy
import json
import random
import re

import pytest

from bench.config import UserError
from bench.pages.evidence import Change, evidence, load
from bench.pages.page import page
from bench.pages.terminal import summary
from bench.results import write
from tests.pages.cases import CORNERS, RECORDING, ROOT, result


def test_published_results_are_read():
    for name in ("cpu-small-text", "cpu-small-finetune"):
        found = load(ROOT / "bench" / "results" / f"{name}.json")
        dynamic = found.runs[-1]
        assert dynamic.name == "dynamic_suffix"
        assert dynamic.row["steps_executed"] == len(dynamic.step_ms) == len(dynamic.active)
        assert dynamic.freezing is not None
        assert set(found.expected_ms) >= {2, 4, 6, 8}


def test_the_original_recording():
    found = load(RECORDING)
    assert [run.name for run in found.runs] == ["full_update", "static_suffix", "dynamic_suffix"]
    dynamic = found.runs[2]
    assert (len(dynamic.probes), dynamic.freezing, dynamic.row["fused"]) == (83, 364, None)
    assert [stage for _, stage in dynamic.recovery] == ["stage1", "stage2", "stage3_full"]
    assert found.budget_ms == found.runs[0].row["elapsed_ms"]
    raw = json.loads(RECORDING.read_bytes())["traces"]["dynamic_suffix"]["active_layers_hist"]
    for change in dynamic.changes:
        assert change.blocks == tuple(range(18 - raw[change.step], 18))


def test_what_was_recorded_wins_over_the_number_of_blocks():
    found = evidence(CORNERS["holes"](), "holes")
    lisa = found.runs[1]
    assert all(len(change.blocks) == 2 for change in lisa.changes)
    assert any(change.blocks[1] - change.blocks[0] > 1 for change in lisa.changes)
    assert found.runs[0].changes == [Change(0, (0, 1, 2, 3, 4, 5))]


def test_blocks_that_run():
    full, grow = evidence(CORNERS["growing"](), "growing").runs
    assert full.running == ()
    assert grow.running == [
        Change(0, (0, 1)),
        Change(10, (0, 1, 2, 3)),
        Change(20, (0, 1, 2, 3, 4, 5)),
    ]


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -1e35, None])
def test_losses_that_ran_away_are_none(lost):
    made = result()
    made["traces"]["static_suffix"]["train_losses"][5] = lost
    made["traces"]["static_suffix"]["val_trace"][2]["val_loss"] = lost
    made["results"][1]["final_val_loss"] = lost
    static = evidence(made, "x").runs[1]
    assert static.losses[5] is static.validations[2].loss is static.row["final_val_loss"] is None
    assert static.losses[4] is not None


def set_at(path: str, value):
    def change(made: dict) -> None:
        *places, last = path.split("/")
        inner = made
        for place in places:
            inner = inner[int(place) if isinstance(inner, list) else place]
        inner[int(last) if isinstance(inner, list) else last] = value

    return change


REFUSED = {
    "another script": (set_at("script", "bench/kernels.py"), "script is 'bench/kernels.py'"),
    "no script": (lambda made: made.pop("script"), "script is None"),
    "config a list": (set_at("config", []), "config must be an object"),
    "no depth": (lambda made: made["config"].pop("n_layers"), "n_layers must be 0.."),
    "no blocks": (set_at("config/n_layers", 0), "n_layers must be >= 1"),
    "a flag of another kind": (set_at("config/lr", "fast"), "lr must be like 0.0003, got 'fast'"),
    "results an object": (set_at("results", {}), "results must be a list"),
    "a row without a name": (set_at("results/0/schedule", 3), "results[0] has no schedule's name"),
    "a schedule twice": (set_at("results/0/schedule", "static_suffix"), "two results of"),
    "a loss in words": (set_at("results/0/final_val_loss", "low"), "final_val_loss of 'full_upd"),
    "lengths": (lambda made: made["traces"]["full_update"]["train_losses"].pop(), "lengths"),
    "more blocks than there are": (
        set_at("traces/full_update/active_layers_hist/3", 7),
        "active_layers_hist of 'full_update' must be 0..6, got '7'",
    ),
    "a block that there is not": (
        set_at("traces/full_update/active_blocks/0/1", [6]),
        "a block in 'full_update' must be 0..5",
    ),
    "a block twice": (set_at("traces/full_update/active_blocks/0/1", [3, 3]), "a block twice"),
    "no set at the start": (set_at("traces/full_update/active_blocks/0/0", 1), "begin at step 0"),
    "no sets": (set_at("traces/full_update/active_blocks", []), "begin at step 0"),
    "changes out of order": (
        set_at("traces/dynamic_suffix/active_blocks/1/0", 0),
        "not in order at step 0",
    ),
    "a running block that there is not": (
        set_at("traces/full_update/running_blocks", [[0, [6]]]),
        "a block in 'full_update' must be 0..5",
    ),
    "blocks that run from later on": (
        set_at("traces/full_update/running_blocks", [[1, [0]]]),
        "running_blocks of 'full_update' must begin at step 0",
    ),
    "a part that there is not": (
        set_at("traces/full_update/parts_ms/6/lunch", 1.0),
        "parts_ms of 'full_update' must have backward, measure, other",
    ),
    "parts of no step": (set_at("traces/full_update/parts_ms/6/steps", 0), "counts no step"),
    "negative warming": (set_at("config/warmup_ignore_steps", -1), "warmup_ignore_steps must be"),
    "probes out of order": (
        set_at("traces/dynamic_suffix/dynamic_trace/0/step", 5),
        "the probes of 'dynamic_suffix' are not in order at step 5",
    ),
    "relevance of another depth": (
        set_at("traces/dynamic_suffix/dynamic_trace/0/ema_scores", [1.0]),
        "at step 0 are 1, the model has 6 blocks",
    ),
    "a validation without a time": (
        lambda made: made["traces"]["full_update"]["val_trace"][0].pop("elapsed_ms"),
        "elapsed_ms in val_trace of 'full_update' must be a number of at most 1e+30, got nothing",
    ),
    "status": (set_at("status", "fine"), "its status is 'fine'"),
    "memory of half a block": (set_at("traces/full_update/memory", {"0.5": 1}), "must be whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, says = REFUSED[case]
    made = result()
    change(made)
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        evidence(made, "x")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [[], 3, "text", None, {}, {"script": "bench/run.py"}])
def test_other_json_is_no_result(content):
    with pytest.raises(ValueError, match=r"must be|script is"):
        evidence(content, "x")


def test_a_file_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "x.json"
    write(path, result())
    assert load(path).name == "x"
    path.write_bytes(path.read_bytes().replace(b'"seed": 7', b'"seed": 8'))
    with pytest.raises(UserError, match="sha256"):
        load(path)


def damaged(base: dict, draw: random.Random) -> dict:
    """A copy in which one value somewhere is another."""
    junk = [None, -1, 0, 1e308, 1e29, float("nan"), "x", [], {}, True, 2**60, [[]], {"a": 1}]
    made = copy.deepcopy(base)
    inner, key = made, draw.choice(list(made))
    while isinstance(inner[key], dict | list) and inner[key] and draw.random() < 0.9:
        inner = inner[key]
        key = draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    inner[key] = draw.choice(junk)
    return made


def read_or_refused(seed: int, count: int, cases: tuple[str, ...]) -> int:
    draw = random.Random(seed)
    read = 0
    for case in cases:
        base = CORNERS[case]()
        for _ in range(count):
            try:
                found = evidence(damaged(base, draw), "x")
            except ValueError:
                continue
            read += 1
            assert not re.search(r'="[^"]*\b(nan|inf)\b', page(found))
            assert summary(found)
    return read


def test_damage_is_refused_or_shown():
    """A value replaced at random: ValueError, or a page and a summary."""
    assert read_or_refused(5, 40, ("ordinary", "nulls")) > 20


@pytest.mark.soak
def test_much_damage_is_refused_or_shown():
    cases = ("ordinary", "nulls", "one block", "holes", "interrupted", "the original's")
    assert read_or_refused(6, 400, cases) > 600
