"""What a schedule would have done on a recorded run: what it is given, its steps and their cost."""

import copy
import dataclasses
import itertools
import re

import pytest

import blocksched.schedules.what_if
from blocksched.schedules import Measuring, Plan
from blocksched.schedules.base import Depth, from_plain
from blocksched.schedules.flags import NAMES
from blocksched.schedules.what_if import spread, what_if
from tests.schedules.recordings import CONFIG, STEPS, N, on_disk, record

MADE = on_disk({name: record(name) for name in NAMES})


def oracle(plan, n):
    """Thirds of a block: forward; backward to its input; backward to its weights."""
    parts = 0.0
    lowest = -1 if plan.stem else min(plan.active)
    for block in plan.running or range(n):
        share = plan.rows if block < plan.lower else 1
        parts += 1
        if block in plan.active:
            parts += 2 * share
        elif block > lowest:
            parts += share
    return parts / 3 / n


def test_the_cost_of_every_active_set():
    for n in range(1, 6):
        for bits in itertools.product((False, True), repeat=n):
            active = tuple(b for b in range(n) if bits[b])
            for stem in (None, True) if active else ():
                plan = Plan(active, stem=stem)
                assert plan.cost(n) == pytest.approx(oracle(plan, n))


@pytest.mark.parametrize(
    ("plan", "thirds"),
    [
        (Plan((4, 5, 6, 7)), 8 + 2 * 4),  # n + 2 k
        (Plan((2, 7)), 8 + 2 * 2 + 4),  # a hole of 4, which passes the gradient on
        (Plan((2, 7), stem=True), 8 + 2 * 2 + 4 + 2),
        (Plan((2, 7), stem=False), 8 + 2 * 2 + 4),
        (Plan((0, 4), running=(0, 4)), 3 * 2),
        (Plan((4,), running=(0, 2, 4, 6)), 4 + 2 + 1),
        (Plan(tuple(range(8)), lower=4, rows=0.25), 8 + 2 * 4 + 2 * 0.25 * 4),
    ],
)
def test_the_cost_of_a_step_of_8_blocks(plan, thirds):
    assert plan.cost(8) == pytest.approx(thirds / 24)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_does_on_its_own_run_what_it_did(name):
    recording = on_disk({name: record(name)})
    source, (outcome,) = what_if(recording, [name], {})
    trace = recording["traces"][name]
    assert (source, list(outcome.active)) == (name, trace["active_layers_hist"])
    assert (outcome.probes, outcome.notes) == (len(trace["readings"]), ())
    assert sum(outcome.shares) == pytest.approx(sum(outcome.active) / STEPS)


def test_a_clock_goes_by_the_recorded_times():
    """400 ms for 40 steps of 10 ms: at the same steps as without a clock."""
    recording = on_disk({"autofreeze": record("autofreeze")})
    recording["config"] |= {"equal_time_budget": True, "time_budget_ms": 400.0}
    _, (outcome,) = what_if(recording, ["autofreeze"], {})
    assert list(outcome.active) == recording["traces"]["autofreeze"]["active_layers_hist"]
    assert min(outcome.active) < N


def test_shares_and_cost_of_a_run():
    _, (full, static, rows) = what_if(MADE, ["full_update", "static_suffix#2", "row_suffix"], {})
    assert (full.shares, full.cost) == ((1.0,) * N, 1.0)
    assert static.schedule == "static_suffix#2"
    assert static.shares == (1.0,) * N  # 6, its default, of 6
    assert rows.cost == pytest.approx((6 + 2 * 2 + 2 * 0.25 * 4) / 18)
    _, (static,) = what_if(MADE, ["static_suffix"], {"static_active_layers": 2})
    assert (static.shares, static.cost) == ((0, 0, 0, 0, 1, 1), pytest.approx(10 / 18))


def test_random_suffix_has_the_sizes_of_the_run():
    recording = copy.deepcopy(MADE)
    for counts in ({}, {"random_counts": ""}):
        recording["config"] = {k: v for k, v in CONFIG.items() if k != "random_counts"} | counts
        _, (random, dynamic) = what_if(recording, ["random_suffix", "dynamic_suffix"], {})
        assert sorted(random.active) == sorted(dynamic.active)
        assert random.active != dynamic.active
    _, (random,) = what_if(recording, ["random_suffix"], {"random_counts": "0,0,0,0,1,0"})
    assert set(random.active) == {5}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["full_update", "autofreeze", "dynamic_suffix#2"], "dynamic_suffix#2"),
        (["full_update", "autofreeze", "lisa"], "autofreeze"),
        (["lisa", "full_update", "grow"], "full_update"),
        (["lisa", "grow"], "lisa"),
    ],
)
def test_which_run_it_is(names, chosen):
    traces = {name: MADE["traces"][name.partition("#")[0]] for name in names}
    if "dynamic_suffix#2" in traces:
        traces["dynamic_suffix#2"] = traces["dynamic_suffix#2"] | {"readings": []}
    assert what_if({"config": CONFIG, "traces": traces}, ["full_update"], {})[0] == chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curious(Measuring):
    """Probes on every other step, with all but block 0, and keeps what it was given in `seen`."""

    seen: list
    timed = False
    metric = ("grad_norm", 0.0)

    def init(self, n_blocks):
        return Depth(n_blocks)

    def plan(self, state, progress):
        probe = progress.step % 2 == 1
        return Plan(tuple(range(1, state.n_blocks)), probe=probe)

    def observe(self, state, plan, reading):
        if plan.probe:
            self.seen.append(reading)
        return state

    def restore(self, plain):
        return from_plain(Depth, plain)


class Timed(Curious):
    timed = True


def ask(monkeypatch, kind, readings):
    schedule = kind(seen=[])
    real = blocksched.schedules.what_if.from_flags
    monkeypatch.setattr(
        blocksched.schedules.what_if,
        "from_flags",
        lambda name, config: (schedule, []) if name == "curious" else real(name, config),
    )
    trace = MADE["traces"]["autofreeze"] | {"readings": readings}
    (outcome,) = what_if({"config": CONFIG, "traces": {"autofreeze": trace}}, ["curious"], {})[1]
    return schedule.seen, outcome.notes


def reading(step, value, **more):
    return {"step": step, "relevance": [value] * N, "forward_ms": None, "backward_ms": None} | more


def test_a_probe_is_given_the_relevance_last_recorded(monkeypatch):
    """Steps 1, 3, ... 39 probe; recorded are 0, 4 and 5. Block 0 does not train."""
    recorded = [reading(0, 1.0), reading(4, 2.0), reading(5, 3.0)]
    seen, notes = ask(monkeypatch, Curious, recorded)
    assert [r.relevance[0] for r in seen] == [0.0] * 20
    assert [r.relevance[1:] for r in seen] == [(v,) * 5 for v in [1.0, 1.0, *[3.0] * 18]]
    assert [r.loss for r in seen] == MADE["traces"]["autofreeze"]["train_losses"][1::2]
    assert {r.forward_ms for r in seen} == {None}
    assert notes == ()


def test_probes_before_the_first_recorded_measure_nothing(monkeypatch):
    seen, notes = ask(monkeypatch, Curious, [reading(4, 2.0)])
    assert [r.relevance is None for r in seen] == [True] * 2 + [False] * 18
    assert notes == ("2 of its probes found no relevance recorded before them",)


def test_times_are_those_recorded_or_the_rule_of_thumb(monkeypatch):
    times = {"forward_ms": [3.0] * N, "backward_ms": [5.0] * N}
    seen, notes = ask(monkeypatch, Timed, [reading(0, 1.0), reading(5, 1.0, **times)])
    assert (seen[0].forward_ms, seen[0].backward_ms) == ((1.0,) * N, (2.0,) * N)
    assert (list(seen[2].forward_ms), list(seen[2].backward_ms)) == ([3.0] * N, [5.0] * N)
    assert notes == ()
    _, notes = ask(monkeypatch, Timed, [reading(0, 1.0)])
    assert notes == ("times of blocks are not recorded: forward 1 ms and backward 2 ms are taken",)


def test_another_metric_is_said():
    recording = on_disk({"dynamic_suffix": record("dynamic_suffix")})
    _, (outcome,) = what_if(recording, ["autofreeze"], {})
    assert outcome.notes == ("it decides by grad_norm, recorded is grad_ratio",)
    flags = {"dyn_relevance_metric": "saliency_abs_gp", "dyn_min_active_layers": 9}
    _, (outcome,) = what_if(recording, ["dynamic_suffix"], flags)
    assert outcome.notes == (
        "--dyn-min-active-layers 9 is outside 1..6: 6 is used",
        "it decides by saliency_abs_gp, recorded is grad_ratio",
    )


@pytest.mark.parametrize(
    ("content", "names", "flags", "message"),
    [
        ({}, ["lisa"], {}, "lacks `config`"),
        (MADE, ["lysa"], {}, "--schedules lysa: unknown schedule 'lysa': choose among"),
        (MADE, ["row_suffix"], {"row_active": 7}, "row_suffix: active must be 1..6, got 7"),
        (MADE, ["row_suffix"], {"row_rows": 0.0}, "--schedules row_suffix: rows must be > 0"),
        (
            {"config": CONFIG, "traces": {"lisa": {k: [] for k in MADE["traces"]["lisa"]}}},
            ["lisa"], {}, "traces.lisa has no steps",
        ),
    ],
)  # fmt: skip
def test_refused(content, names, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        what_if(content, names, flags)


def test_many_blocks_are_shown_in_groups():
    assert spread((0.0, 1.0)) == [0.0, 1.0]
    assert spread([i / 100 for i in range(100)], 4) == pytest.approx([0.12, 0.37, 0.62, 0.87])
