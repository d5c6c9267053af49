"""The computed clock: what a step costs, and where its prices come from."""

import json

import pytest
import torch

import bench.trials.prices as prices
from bench.config import UserError, resolve
from bench.costs import PARTS, anchors
from bench.results import read, write
from bench.tasks.text import TextTask
from bench.trials.prices import Priced, PriceList, Prices
from blocksched.schedules import Plan
from blocksched.schedules.base import suffix
from tests.trials.tiny import (
    FLAGS,
    FORWARD,
    MEASURING,
    PASS,
    UPDATE,
    WEIGHTS,
    N,
    made_up,
    price_ms,
    write_prices,
)

CPU = torch.device("cpu")
FULL = Plan(suffix(N, N))


@pytest.fixture
def cell(text_file):
    """A function: flags -> the task, the flags and the kernels of a cell."""

    def made(**flags):
        config = resolve({**FLAGS, "task": "text", "data": str(text_file), **flags})
        return TextTask(config, CPU), config, False

    return made


@pytest.fixture
def measured(monkeypatch):
    """What was measured: a list that grows."""
    seen = []
    monkeypatch.setattr(
        prices, "_measure", lambda _task, config, _: seen.append(config.batch_size) or made_up()
    )
    return seen


@pytest.mark.parametrize(
    "plan",
    [
        *(Plan(suffix(N, k)) for k in range(1, N + 1)),
        Plan((1,)),
        Plan((1, 3)),
        Plan((0, 2), stem=True),
        Plan((0, 1), running=(0, 1)),
        Plan((2, 3), running=(0, 2, 3)),
    ],
    ids=str,
)
def test_the_price_of_a_step(plan):
    """On lines through the anchors lies what each block adds."""
    assert Prices(N, made_up()).step_ms(plan) == pytest.approx(price_ms(plan))


def test_a_probe_costs_what_measuring_adds():
    known = Prices(N, made_up())
    for active in (FULL.active, (2, 3)):
        plan, probe = Plan(active), Plan(active, probe=True)
        assert known.step_ms(probe) == pytest.approx(known.step_ms(plan) + MEASURING)


def test_the_price_of_a_block():
    forward, backward = Prices(N, made_up()).block_ms()
    assert forward == pytest.approx(FORWARD)
    assert backward == pytest.approx(PASS + WEIGHTS)
    assert UPDATE > 0  # of which neither has a part


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_the_price_of_a_block_of_any_depth(n):
    parts = [[name, list(shape), {"suffix": 6.0 * shape.active}.get(name, 0.0)]
             for shape in anchors(n) for name in PARTS]  # fmt: skip
    forward, backward = Prices(n, {"parts": parts, "measuring": 0.0}).block_ms()
    assert forward + backward == pytest.approx(6.0)
    assert forward >= 0
    assert backward >= 0


def test_priced_gives_times_of_measured_steps_alone():
    times = Priced(N, Prices(N, made_up()))
    times.expect(False)
    assert times.read() is None
    times.expect(True)
    forward, backward = times.read()
    assert forward == pytest.approx([FORWARD] * N)
    assert backward == pytest.approx([PASS + WEIGHTS] * N)


def test_prices_are_measured_once_and_read_afterwards(cell, measured, tmp_path):
    path = tmp_path / "prices.json"
    first = PriceList(path)
    assert first.of(*cell()).step_ms(FULL) == pytest.approx(price_ms(FULL))
    first.of(*cell(lr=0.1, steps=99, seed=7))  # which a step's time does not depend on
    assert measured == [2]
    again = PriceList(path)
    again.of(*cell())
    again.of(*cell(batch_size=4))
    assert measured == [2, 4]
    assert len(read(path)) == 2
    assert again.content == read(path)
    stamp = path.stat().st_mtime_ns
    PriceList(path).of(*cell(batch_size=4))
    assert path.stat().st_mtime_ns == stamp


def test_what_a_step_takes_has_its_own_price(cell, measured, tmp_path):
    known = PriceList(tmp_path / "prices.json")
    task, config, _ = cell()
    for flags in ({}, {"dmodel": 32}, {"n_heads": 2}, {"seq_len": 8}, {"dtype": "bfloat16"}):
        known.of(*cell(**flags))
    known.of(task, config, True)
    known.of(task, cell(backend="compile")[1], True)
    assert len(measured) == 7


def test_the_file_that_tests_prepare_is_the_one_that_is_read(cell, measured, tmp_path):
    PriceList(write_prices(tmp_path)).of(*cell())
    assert measured == []


def test_measured_for_once(cell, tmp_path, monkeypatch):
    """Every part, and what measuring adds, in milliseconds that are no less than 0."""
    monkeypatch.setattr(prices, "_ROUNDS", 2)
    monkeypatch.setattr(prices, "_STEPS", 2)
    known = PriceList(tmp_path / "prices.json").of(*cell())
    assert 0 < known.step_ms(Plan((3,))) < 1000
    assert known.step_ms(Plan(FULL.active, probe=True)) >= known.step_ms(FULL) > 0


def without(plain, key):
    return {name: value for name, value in plain.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: None,
        lambda _: [],
        lambda plain: without(plain, "measuring"),
        lambda plain: without(plain, "parts"),
        lambda plain: plain | {"measuring": None},  # as a NaN is written
        lambda plain: plain | {"measuring": -1.0},
        lambda plain: plain | {"parts": plain["parts"][1:]},
        lambda plain: plain | {"parts": [[name, shape, "1"] for name, shape, _ in plain["parts"]]},
        lambda plain: plain | {"parts": [[name, 3, ms] for name, _, ms in plain["parts"]]},
        lambda plain: plain | {"parts": [[name, ms] for name, _, ms in plain["parts"]]},
    ],
)
def test_prices_that_are_none_are_refused(damage, cell, measured, tmp_path):
    path = write_prices(tmp_path)
    ((size, plain),) = read(path).items()
    write(path, {size: damage(plain)})
    with pytest.raises(UserError, match="holds no prices of") as caught:
        PriceList(path).of(*cell())
    assert str(path) in str(caught.value)
    assert measured == []


def test_a_damaged_file_is_refused(tmp_path):
    path = write_prices(tmp_path)
    whole = path.read_bytes()
    for content in (b"", whole[:-20], whole.replace(b"2.1", b"2.2", 1), b"[]", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            PriceList(path)
        assert str(path) in str(caught.value)
    assert json.loads(whole)


def test_prices_that_are_given_are_not_measured(cell, measured, tmp_path):
    """They go before those of the study's folder, which gets what they lack."""
    given = write_prices(tmp_path, factor=2.0)
    own = tmp_path / "own.json"
    write(own, read(write_prices(tmp_path / "other")))
    known = PriceList(own, given)
    assert known.of(*cell()).step_ms(FULL) == pytest.approx(2 * price_ms(FULL))
    assert measured == []
    before = given.read_bytes()
    known.of(*cell(batch_size=4))
    assert measured == [4]
    assert given.read_bytes() == before
    assert len(read(own)) == 2


def test_a_given_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        PriceList(tmp_path / "prices.json", tmp_path / "none.json")
