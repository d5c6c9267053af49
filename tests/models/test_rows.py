"""Real models, their lowest blocks on some rows: the gradient averages to the full one, or an error
says why it cannot."""

import dataclasses

import pytest
import torch
from torch import nn

import blocksched.rows
from blocksched.blocks import find_blocks
from blocksched.rows import Rows
from tests.models.conftest import CASES, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def exact(model):
    """In float64, without dropout or a cache of keys and values."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
            module.config.output_router_logits = False  # a loss that is not linear in the rows
            module.config._experts_implementation = "eager"  # the others lack float64
    return model.double()


def gradients(case, model):
    model.zero_grad()
    case.loss_at(model, 3).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def halves(case, model):
    """The gradients with the one row of two chosen, and with the other."""
    draws = [(torch.tensor([row]), torch.tensor([1 - row])) for row in (0, 1)]
    for draw in draws:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocksched.rows._Draw, "__call__", lambda *_, draw=draw: draw)
            rows = Rows(find_blocks(model, case.argument))
            rows.apply(2, 0.5, 0)
            yield gradients(case, model)
            rows.close()


def masked_loss(model, generator):
    """Rows of other lengths, which the blocks are told by a mask."""
    ids, mask = tokens(generator), torch.ones(2, 6, dtype=torch.long)
    mask[0, 3:] = 0
    labels = torch.where(mask == 0, -100, ids)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_so_they_do_under_a_mask(cases, name):
    check(dataclasses.replace(cases[name], loss=masked_loss))


@pytest.mark.usefixtures("in_float64")
def test_both_rows_average_to_the_batch(case):
    if case is CASES["stages"]:
        with pytest.raises(ValueError, match="normalises over the rows of a batch"):
            check(case)
    else:
        check(case)


def test_a_cache_of_keys_and_values_is_refused(cases):
    model = cases["gpt2"].make()
    Rows(find_blocks(model)).apply(2, 0.5, 0)
    with pytest.raises(ValueError, match=r"is given a DynamicCache.*pass use_cache=False"):
        cases["gpt2"].loss_at(model, 0)


def check(case):
    model = exact(case.make())
    full = gradients(case, model)
    first, second = halves(case, model)
    assert full.keys() == first.keys() == second.keys()
    assert any((first[key] - full[key]).abs().max() > 1e-6 for key in full)
    mean = {key: (first[key] + second[key]) / 2 for key in full}
    torch.testing.assert_close(mean, full, rtol=0, atol=2**-24)  # T5's softmax is in float32
