"""The cost model on paper: its document, what it is checked against, and limits known in closed
form."""

from pathlib import Path

import pytest

from bench import cost_model
from bench.cost_model import SHAPES, ddp, fsdp, memory, operations, ring, root_vote, trained, update
from bench.scale import TABLES, measured, predicted

DOCUMENT = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
STEPS = [(ddp, SHAPES[0]), (fsdp, SHAPES[0]), (fsdp, SHAPES[1]), (fsdp, SHAPES[2])]


@pytest.mark.parametrize("title", TABLES)
def test_the_document_holds_what_the_script_prints(title):
    _, _, section = DOCUMENT.partition(f"## {title}\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert "\n".join(rows) == TABLES[title]()


def test_step_ratios_agree_with_those_measured():
    text, finetune = measured().values()
    noise = max(abs(text[k] - finetune[k]) for k in text)  # two runs of the same steps
    for k in text:
        assert min(abs(predicted(k) - run[k]) for run in (text, finetune)) < noise, k


def test_parameters_are_those_published():
    published = [1.236e9 + SHAPES[0].embedding, 8.03e9, 70.55e9]  # the 1B model's head is tied
    for shape, count in zip(SHAPES, published, strict=True):
        assert shape.parameters == pytest.approx(count, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_operations_are_six_a_parameter_and_a_third_of_that_forward(shape):
    n, blocks = shape.blocks, shape.blocks * shape.block
    assert operations(shape, n, 0) == 6 * (blocks + shape.embedding)
    saved = 2 * shape.width * (shape.width + 2 * shape.kv)
    assert operations(shape, n // 2, 0) == 4 * blocks + 6 * shape.embedding - saved
    assert operations(shape, n, 0, checkpointing=True) == 8 * blocks + 6 * shape.embedding
    assert operations(shape, n // 2, 0, checkpointing=True) == (
        5 * blocks + 6 * shape.embedding - saved
    )


@pytest.mark.parametrize(("model", "shape"), STEPS)
@pytest.mark.parametrize("gpus", [8, 64, 1024])
@pytest.mark.parametrize("tokens", [1, 1024, 8192, 10**7])
def test_a_step_with_fewer_active_blocks_is_never_longer(model, shape, gpus, tokens):
    steps = [model(shape, k, gpus, tokens).step for k in range(1, shape.blocks + 1)]
    assert steps == sorted(steps)
    n = shape.blocks
    computing = operations(shape, n, 8192) * tokens / (989e12 * 0.4)
    assert steps[-1] >= computing
    if tokens == 10**7:  # all but the last piece hides behind computing
        assert steps[-1] == pytest.approx(computing, rel=0.01)


@pytest.mark.parametrize("k", [4, 16])
def test_where_the_network_is_the_limit_a_step_is_its_traffic(k):
    shape = SHAPES[0]
    traffic = 2 * ring(4 * trained(shape, k), 1024) + update(trained(shape, k))
    assert ddp(shape, k, 1024, 1).step == pytest.approx(traffic, rel=1e-3)
    weights = shape.parameters + k * shape.block + shape.embedding
    traffic = ring(2 * weights + 4 * trained(shape, k), 1024) + update(trained(shape, k) / 1024)
    assert fsdp(shape, k, 1024, 1).step == pytest.approx(traffic, rel=1e-3)


def test_a_slower_network_waits_longer(monkeypatch):
    before = ddp(SHAPES[0], 16, 1024, 1024)
    monkeypatch.setattr(cost_model, "NODE", cost_model.NODE._replace(value=1e11))
    after = ddp(SHAPES[0], 16, 1024, 1024)
    assert after.waits > before.waits
    assert after.step - before.step == pytest.approx(after.waits - before.waits)


def test_freezing_saves_gradients_and_what_is_kept_and_no_moments():
    shape = SHAPES[1]
    full, few = (memory(shape, k, 64, "FSDP2") for k in (32, 8))
    assert full[0] == few[0] == 12 * shape.parameters / 64
    assert few[1] == 4 * (8 * shape.block + shape.embedding) / 64 < full[1]
    assert few[2] == full[2] / 4


def test_votes():
    assert cost_model.ring_vote(2) == 30e-6
    assert root_vote(8) == pytest.approx(4 * 30e-6 + 7 * 3e-6)
