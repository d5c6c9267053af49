"""The cells of a study on the computed clock: pairs are fair, and the same prices give the same."""

import itertools
import shutil
import time

import pytest
import torch

import bench.tasks.finetune as finetune
import bench.trials.cells as cells
import bench.trials.prices as prices
from bench.config import UserError, resolve
from bench.results import read, write
from bench.tasks.corpus import Corpus
from bench.tasks.text import TextTask
from bench.train import Arm
from bench.trials.cells import Cells
from bench.trials.design import load
from blocksched.schedules import Plan
from tests.trials.tiny import FLAGS, TWO, N, price_ms, run, study_file, write_prices

CPU = torch.device("cpu")
ONE = "seeds = [1]"
ALL = {"full_update": {}, "again": {"schedule": "full_update"},
       "top2": {"schedule": "static_suffix"}, "payoff": {}, "grow": {}, "cyclic": {}}  # fmt: skip


@pytest.fixture
def made(text_file, tmp_path):
    """A function: arms, flags -> a study file, its prices beside the cells."""

    def build(arms=TWO, top="", name="study", **flags):
        path = study_file(tmp_path / name, text_file, arms, top, **flags)
        write_prices(path.parent / "out", batch_sizes=(2, 1))
        return path

    return build


@pytest.fixture(scope="module")
def once(text_file, tmp_path_factory):
    path = study_file(tmp_path_factory.mktemp("once"), text_file, steps=6)
    write_prices(path.parent / "out")
    run(path)
    return path.parent


@pytest.fixture
def ran(once, tmp_path):
    """A study file, and beside it cells that have ended."""
    shutil.copytree(once, tmp_path / "study")
    return tmp_path / "study" / "study.toml"


@pytest.fixture
def watched(monkeypatch):
    """Each arm that was made, with the plans of its steps and the prices that they had."""
    arms = []

    class Watched(Arm):
        def __init__(self, *args, counted, **named):
            def noted(plan, ms):
                self.counted.append((plan, counted(plan, ms)))
                return self.counted[-1][1]

            self.counted = []
            super().__init__(*args, counted=noted, **named)
            self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
            arms.append(self)

    monkeypatch.setattr(cells, "Arm", Watched)
    return arms


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_arms_of_a_seed_start_alike_and_see_the_same(made, watched, monkeypatch):
    seen = {}
    batch = TextTask.batch

    def noted(task, step):
        found = batch(task, step)
        seen.setdefault((id(task), step), found)
        return found

    monkeypatch.setattr(TextTask, "batch", noted)
    run(made({**TWO, "grow": {}}, steps=6))
    assert len(watched) == 6
    by_seed = [watched[:3], watched[3:]]
    for arms in by_seed:
        assert all(same(arms[0].start, arm.start) for arm in arms)
        for step in range(4):
            inputs = [seen[id(arm._task), step][0] for arm in arms]
            assert all(torch.equal(inputs[0], each) for each in inputs)
    assert not same(by_seed[0][0].start, by_seed[1][0].start)
    one, two = (seen[id(arms[0]._task), 0][0] for arms in by_seed)
    assert not torch.equal(one, two)


def test_half_a_batch_sees_the_first_half_of_each_and_is_validated_on_the_same(made, watched):
    """The same start too, and the same learning rate at the same time: the rest is the arm's."""
    half = {"schedule": "full_update", "batch_size": 1, "val_batches": 4}
    run(made({"full_update": {}, "half": half}, ONE))
    full, less = watched[:2]
    assert same(full.start, less.start)
    for step in range(4):
        assert torch.equal(less._task.batch(step)[0], full._task.batch(step)[0][:1])
    text = [torch.cat([inputs for inputs, _ in arm._task.validation()]) for arm in watched[:2]]
    assert torch.equal(*text)
    assert full.val_trace[0]["val_loss"] == pytest.approx(less.val_trace[0]["val_loss"], rel=1e-5)


def test_the_same_study_twice_gives_the_same_to_the_bit(made, monkeypatch):
    """Whatever the machine's clock does."""
    first = run(made(ALL, ONE, name="first"))
    ticks, chance = itertools.count(), torch.Generator().manual_seed(1)
    now = [0.0]

    def disturbed():
        now[0] += float(torch.rand((), generator=chance)) * (100 if next(ticks) % 50 == 0 else 1e-3)
        return now[0]

    monkeypatch.setattr(time, "perf_counter", disturbed)
    second = run(made(ALL, ONE, name="second"))
    assert first.done == second.done
    assert next(ticks) > 100


def test_the_clock_is_the_sum_of_prices_of_what_was_planned(made, watched):
    found = run(made(ALL, ONE)).done
    assert {arm.name: any(plan.probe for plan, _ in arm.counted) for arm in watched}["payoff"]
    for arm, cell in zip(watched, found.values(), strict=True):
        plans = [plan for plan, _ in arm.counted]
        assert cell["arm"] == arm.name
        assert cell["elapsed_ms"] == pytest.approx(sum(map(price_ms, plans)))
        assert cell["mean_step_ms"] == pytest.approx(cell["elapsed_ms"] / cell["steps"])
        assert cell["steps"] == len(plans) == sum(cell["active_counts"])
        assert cell["probes"] == sum(plan.probe for plan in plans)
        for k in range(1, N + 1):
            assert cell["active_counts"][k - 1] == sum(len(plan.active) == k for plan in plans)
        budget, last = 12 * found["text", "full_update", 1]["mean_step_ms"], price_ms(plans[-1])
        assert cell["budget_ms"] == pytest.approx(budget)
        assert 0 <= cell["elapsed_ms"] - cell["budget_ms"] <= last  # equal time, but for a step
        assert cell["val_trace"][-1]["val_loss"] == cell["final_val_loss"]
        assert cell["val_trace"][-1]["elapsed_ms"] == cell["elapsed_ms"]


@pytest.mark.parametrize("steps", [7, 13, 20])
def test_the_baseline_takes_the_steps_that_set_the_budget(steps, made):
    path = made({"full_update": {}}, ONE, steps=steps)
    found = run(path).done
    assert found["text", "full_update", 1]["steps"] == steps


def test_payoff_decides_by_prices(made, watched):
    """What it reads of a block are the prices, of every block the same."""
    run(made({"full_update": {}, "payoff": {}}, ONE))
    arm = watched[1]
    times = {(*each["forward_ms"], *each["backward_ms"]) for each in arm.readings}
    (only,) = times
    assert only == pytest.approx([1.1] * N + [2.2] * N)


def test_a_time_factor_shortens_or_lengthens_what_fits(made):
    slow, fast = ({"schedule": "full_update", "time_factor": f} for f in (2, 0.5))
    found = run(made({"full_update": {}, "slow": slow, "fast": fast}, ONE)).done
    assert [found["text", arm, 1]["steps"] for arm in ("full_update", "slow", "fast")] == [
        12,
        6,
        24,
    ]
    losses = [found["text", arm, 1]["final_val_loss"] for arm in ("fast", "full_update", "slow")]
    assert losses == sorted(losses)


def test_the_most_steps(made):
    fast = {"schedule": "full_update", "time_factor": 0.01}
    found = run(made({"full_update": {}, "fast": fast}, ONE, max_steps_multiplier=2.0)).done
    assert found["text", "fast", 1]["steps"] == 24


def test_an_arm_that_diverges_is_kept_as_failed(made):
    wild = {"schedule": "full_update", "lr": 1e30}
    path = made({"full_update": {}, "wild": wild, "top2": TWO["top2"]}, ONE, max_skipped=2)
    found = run(path).done
    cell = found["text", "wild", 1]
    assert "not finite" in cell["failure"]
    assert cell["final_val_loss"] is None
    assert 0 < cell["steps"] < found["text", "full_update", 1]["steps"]
    assert found["text", "top2", 1]["failure"] is None
    assert run(path).done == found


def test_a_loss_that_is_not_finite_at_the_end_is_a_failure(made, monkeypatch):
    """Although no step was skipped too often: what is kept is what a second look finds."""
    loss = TextTask.loss

    def lost(task, outputs, targets):
        value = loss(task, outputs, targets)
        return value if torch.is_grad_enabled() else value * float("nan")

    monkeypatch.setattr(TextTask, "loss", lost)
    path = made(top=ONE)
    found = run(path).done
    assert "not finite" in found["text", "top2", 1]["failure"]
    assert found["text", "top2", 1]["final_val_loss"] is None
    assert Cells(load(path), path.parent / "out").done == found


def test_nothing_that_has_ended_runs_again(ran, text_file, watched):
    def files():
        return {
            each: (each.read_bytes(), each.stat().st_mtime_ns) for each in ran.parent.rglob("*.*")
        }

    before = files()
    found = run(ran).done
    assert len(found) == 4
    assert files() == before
    assert watched == []
    more = study_file(ran.parent, text_file, TWO | {"grow": {}}, "seeds = [1, 2, 3]", steps=6)
    assert run(more).done.items() >= found.items()
    assert [arm.name for arm in watched] == ["grow", "grow", "full_update", "top2", "grow"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lr": 0.02}, "--lr 0.01 there, 0.02 here"),
        ({"arms": TWO | {"top2": {"schedule": "full_update"}}}, "--schedules static_suffix there"),
        ({"arms": TWO | {"top2": TWO["top2"] | {"time_factor": 2}}}, "time_factor 1.0 there, 2"),
    ],
)
def test_a_cell_of_other_flags_is_refused(flags, said, ran, text_file):
    path = study_file(ran.parent, text_file, **{"steps": 6} | flags)
    with pytest.raises(UserError, match="was run otherwise") as caught:
        run(path)
    assert said in str(caught.value)
    assert "text-" in str(caught.value)


def test_a_cell_of_another_clock_or_place_is_refused(ran):
    out = ran.parent / "out"
    good = (out / "text-top2-1.json").read_bytes()
    content = read(out / "text-top2-1.json")
    content["cells"][0]["clock"] = "time"
    write(out / "text-top2-1.json", content)
    with pytest.raises(UserError, match="clock time there, cost here"):
        run(ran)
    (out / "text-top2-1.json").write_bytes((out / "text-top2-2.json").read_bytes())
    with pytest.raises(UserError, match=r"1\.json compares text, seed 2: top2, the study"):
        run(ran)
    for damage in (b"", good[:-30], good.replace(b'"probes": 0', b'"probes": 1', 1), b"[]", b"{}",
                   b'{"cells": 3}', good.replace(b'"seed": 1', b'"seed": 7', 1)):  # fmt: skip
        (out / "text-top2-1.json").write_bytes(damage)
        assert damage != good
        with pytest.raises(UserError, match=r"text-top2-1\.json"):
            run(ran)


@pytest.mark.parametrize("name", ["prices.toml", "text-top2-2.toml"])
def test_a_study_named_as_one_of_its_files(name, ran):
    with pytest.raises(UserError, match="must not be named"):
        Cells(load(ran.rename(ran.with_name(name))), ran.parent / "out")


def test_cells_of_other_prices_are_not_mixed(ran):
    out = ran.parent / "out"
    (out / "text-top2-2.json").unlink()
    write_prices(out, factor=1.5)
    with pytest.raises(UserError, match=r"prices\.json is not what text, seed 1: full_update was"):
        run(ran)
    write_prices(out)
    assert len(run(ran).done) == 4


def test_a_confirmation_is_of_one_code(made, text_file, monkeypatch):
    arms = {"full_update": {}, "again": {"schedule": "full_update"}}
    search = made(arms, "seeds = [10]", name="search")
    seeds = f"seeds = {[*range(10, 20)]}\nnull = 'again'\nconfirms = ['../other.toml']"
    other = study_file(search.parent / "other", text_file)
    other.rename(search.parents[1] / "other.toml")
    confirmation, out = load(made(arms, seeds)), search.parent / "out"
    found = run(search).done
    assert Cells(confirmation, out).done == found
    monkeypatch.setattr(cells, "code_sha256", lambda: "other")
    assert Cells(load(search), out).done == found
    with pytest.raises(UserError, match="was run by other code"):
        Cells(confirmation, out)


def test_a_start_is_the_same_for_every_batch_size_and_seed(text_file, tmp_path, monkeypatch):
    """Of fine-tuning, where a start is pretrained."""
    sources = torch.tensor(list(b"def sources(): return 1\n" * 60), dtype=torch.uint8)
    corpus = Corpus("sources", "0" * 64, sources[:1000], sources[1000:])
    monkeypatch.setattr(finetune, "python_sources", lambda _least: corpus)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = {**FLAGS, "task": "finetune", "data": str(text_file), "pretrain_steps": 2,
            "pretrain_batch_size": 2}  # fmt: skip
    starts = []
    for flags in ({}, {"seed": 5}, {"batch_size": 4, "val_batches": 1}, {"lr": 0.5, "steps": 3}):
        starts.append(finetune.FinetuneTask(resolve(tiny | flags), CPU).model(False).state_dict())
        assert len(list((tmp_path / "blocksched").iterdir())) == 1
    assert all(same(starts[0], start) for start in starts)


def test_prices_are_measured_once_for_a_study(made, monkeypatch):
    path = made()
    plain = read(path.parent / "out" / "prices.json")
    (path.parent / "out" / "prices.json").unlink()
    asked = []
    (known,) = [value for key, value in plain.items() if '"batch_size": 2' in key]
    monkeypatch.setattr(prices, "_measure", lambda *_: asked.append(1) or known)
    first = run(path)
    assert asked == [1]
    assert list(first.prices.content.values()) == [known]


def test_a_study_may_name_its_prices(tmp_path, text_file, monkeypatch):
    """The file lies beside it, and gives the same study wherever it runs."""
    monkeypatch.setattr(prices, "_measure", lambda *_: pytest.fail("measured"))
    path = study_file(tmp_path / "study", text_file, top='prices = "known.json"')
    write_prices(path.parent, factor=2.0).rename(path.parent / "known.json")
    for (_, arm, _), found in run(path).done.items():
        ms = 2 * price_ms(Plan((2, 3) if arm == "top2" else (0, 1, 2, 3)))
        assert found["mean_step_ms"] == pytest.approx(ms)
