"""The signals that tell blocks apart: a tiny run, and what is known of simple numbers."""

import json

import pytest
import torch

from bench import signals
from bench.config import resolve
from bench.tasks.text import TextTask


@pytest.fixture(scope="module")
def config(text_file):
    sizes = {"dmodel": 16, "n_layers": 3, "seq_len": 16, "batch_size": 2, "val_batches": 1}
    return resolve(
        {"device": "cpu", "preset": "small", "steps": 20, "data": str(text_file)} | sizes
    )


@pytest.fixture(scope="module")
def found(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "MOMENTS", (0.05, 0.3))
        return signals.measure(TextTask(config, torch.device("cpu")), config, steps=2)


def test_a_table_with_every_signal_and_truth(found):
    lines = signals.table(found)
    assert [at["step"] for at in found] == [1, 6]
    assert len(lines) == 3 + len(found[0]["signals"][0])
    assert all(
        len(values) == 3 for at in found for kind in at["truths"] for values in kind.values()
    )
    json.dumps(found, allow_nan=False)


def test_readings_are_those_of_the_blocks(config, found):
    """Worked out anew with autograd's own .grad, at the first moment."""
    task = TextTask(config, torch.device("cpu"))
    _, (model, made) = next(iter(signals.moments(task, config)))
    first = 2 * signals._APART
    inputs, targets = task.batch(first)
    task.loss(task.forward(model, inputs), targets).backward()
    reading = found[0]["signals"][0]
    for b, block in enumerate(model.blocks):
        grads = torch.cat([p.grad.flatten() for p in block.parameters()])
        m = torch.cat([made.state[p]["exp_avg"].flatten() for p in block.parameters()])
        assert reading["grad_norm |g|"][b] == pytest.approx(float(grads.norm()), rel=1e-4)
        assert reading["agreement cos(g, m)"][b] == pytest.approx(
            float(torch.cosine_similarity(grads, m, dim=0)), rel=1e-3, abs=1e-5
        )
    assert reading["the block's number"] == [0.0, 1.0, 2.0]


def test_truths_train_only_what_they_say(config):
    """Without steps nothing is bought; the run itself is left as it was."""
    task = TextTask(config, torch.device("cpu"))
    step, run = next(iter(signals.moments(task, config)))
    before = [p.detach().clone() for p in run[0].parameters()]
    assert signals.truths(task, config, run, step, 0, 0) == {
        kind: [0.0] * 3 for kind in ("alone", "missed", "suffix")
    }
    truth = signals.truths(task, config, run, step, 0, 3)
    assert truth["alone"][-1] == truth["suffix"][0]
    assert len({*truth["alone"], *truth["suffix"], *truth["missed"]}) == 8
    assert all(torch.equal(a, b) for a, b in zip(before, run[0].parameters(), strict=True))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1.0, 2.0, 3.0), (10.0, 20.0, 900.0), 1.0),
        ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), -1.0),
        ((1.0, 2.0, 3.0), (2.0, 1.0, 3.0), 0.5),
        ((1.0, 2.0, 3.0), (5.0, 5.0, 5.0), 0.0),
    ],
)
def test_rank_correlation(a, b, expected):
    assert signals.rank_correlation(a, b) == pytest.approx(expected)
