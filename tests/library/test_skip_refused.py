"""Blocks that cannot be skipped are refused."""

import pytest
import torch
from torch import nn

import blocksched as bs
from blocksched.skip import Skips


class Pooling(nn.Linear):
    """Halves the rows."""

    def forward(self, x):
        return super().forward(x)[::2]


class Named(nn.Linear):
    """Gives a dict."""

    def forward(self, x):
        return {"x": super().forward(x)}


@pytest.mark.parametrize(
    ("blocks", "running", "error", "message"),
    [
        ([nn.Linear(8, 8), nn.Linear(8, 8)], (1,), ValueError, r"block 0 \(0\) has to run, got"),
        (
            [nn.Linear(8, 8), nn.Linear(8, 4)], (0,), ValueError,
            r"block 1 \(1\) does not run yet .* block 0 \(0\) later: weight is float32 \[4, 8\] in "
            r"the first, float32 \[8, 8\] in the second; pass blocks=",
        ),
        ([nn.Linear(8, 8, bias=False), nn.Linear(8, 8)], (0,), ValueError, "bias is only in the"),
        ([Pooling(8, 8), Pooling(8, 8)], (0,), ValueError, r"0 gives \[2, 8\] for \[4, 8\]"),
        ([Named(8, 8), Named(8, 8)], (0,), TypeError, "gives dict, .* or a tuple that begins with"),
        ([nn.LSTM(8, 8), nn.LSTM(8, 8)], (0,), TypeError, "called with tuple as its first arg"),
    ],
)  # fmt: skip
def test_refused(blocks, running, error, message):
    model = nn.Sequential(*blocks)

    def run():
        Skips(bs.find_blocks(model)).apply(running)
        model(torch.zeros(4, 8))

    with pytest.raises(error, match=message):
        run()
