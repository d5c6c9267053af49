"""Real models, their lowest blocks on some rows: the gradient averages to the full one, or an error
says why it cannot."""

import pytest
import torch
from torch import nn

import blocksched.rows
from blocksched.blocks import find_blocks
from blocksched.rows import Rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

REFUSED = {
    "stages": "normalises over the rows of a batch",
}


def exact(model):
    """In float64, without dropout or a cache of keys and values."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
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
            rows = Rows(model, find_blocks(model, case.argument))
            rows.apply(2, 0.5, 0)
            yield gradients(case, model)
            rows.close()


def test_both_rows_average_to_the_batch(case, request):
    model = exact(case.make())
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    why = REFUSED.get(request.node.callspec.params["case"])
    if why is not None:
        with pytest.raises((ValueError, RuntimeError), match=why):
            list(halves(case, model))
        return
    full = gradients(case, model)
    first, second = halves(case, model)
    assert full.keys() == first.keys() == second.keys()
    assert any((first[key] - full[key]).abs().max() > 1e-6 for key in full)
    mean = {key: (first[key] + second[key]) / 2 for key in full}
    torch.testing.assert_close(mean, full, rtol=0, atol=1e-12)
