"""find_blocks: what counts as a block, as stem and as head."""

import pytest
import torch
from torch import nn

from blocksched import find_blocks


def ids(parameters):
    return {id(p) for p in parameters}


def test_tiny_model(tiny):
    model = tiny()
    found = find_blocks(model)
    assert found.names == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert found.modules == tuple(model.blocks)
    assert ids(found.stem) == ids(model.embed.parameters())
    assert ids(found.head) == ids(model.head.parameters())
    assert [ids(p) for p in found.parameters] == [ids(b.parameters()) for b in model.blocks]


def test_tied_weight_is_the_heads(tiny):
    found = find_blocks(tiny(tied=True))
    assert not found.stem
    assert len(found.head) == 1


def test_parameters_frozen_beforehand_do_not_count(tiny):
    model = tiny()
    model.blocks[1].requires_grad_(False)
    model.embed.requires_grad_(False)
    found = find_blocks(model)
    assert found.parameters[1] == ()
    assert found.stem == ()


def test_experts_inside_a_block_are_not_blocks():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(Expert() for _ in range(3)))
    assert find_blocks(model).names == ("1.0", "1.1", "1.2")


def test_several_lists_are_not_guessed_between():
    model = nn.ModuleDict(
        {"encoder": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)),
         "decoder": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"encoder \(3\), decoder \(3\).*blocks="):
        find_blocks(model)
    found = find_blocks(model, blocks="decoder")
    assert found.names[0] == "decoder.0"
    assert ids(found.stem) == ids(model["encoder"].parameters())
    assert find_blocks(model, blocks=list(model["decoder"])).names == found.names


@pytest.mark.parametrize(
    ("n", "width", "close"),
    [
        (2, 1, False),
        (3, 1, True),  # half as many modules
        (7, 1, True),  # the blocks are the shorter list, but hold the weights
        (2, 20, True),  # more than half as many parameters
    ],
)
def test_a_list_that_is_half_as_long_or_as_large_is_not_guessed_away(tiny, n, width, close):
    model = tiny(n=6)
    model.others = nn.ModuleList(nn.Linear(width, width) for _ in range(n))
    if close:
        with pytest.raises(ValueError, match=rf"blocks \(6\), others \({n}\)"):
            find_blocks(model)
    assert find_blocks(model, blocks="blocks").names[0] == "blocks.0"
    assert close or find_blocks(model).names[0] == "blocks.0"


class Scaled(nn.Module):
    """Positions, lists and modules held by the root, registered before the blocks."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(4))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(3))
        self.embed = nn.Embedding(4, 4)
        self.norm = nn.LayerNorm(4)
        self.body = nn.Module()
        self.body.gain = nn.Parameter(torch.ones(()))
        self.body.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.final_norm = self.norm


def test_what_modules_around_the_blocks_hold_themselves_is_the_heads():
    model = Scaled()
    found = find_blocks(model)
    assert ids(found.stem) == ids([model.embed.weight])
    outside = [model.positions, *model.scales, model.body.gain, *model.norm.parameters()]
    assert ids(found.head) == ids(outside)
    found = find_blocks(model, stem=["embed", "positions"])
    assert ids(found.stem) == ids([model.embed.weight, model.positions])


def test_no_list_at_all():
    with pytest.raises(ValueError, match="blocks="):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="blocks="):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_names_that_do_not_exist(tiny):
    with pytest.raises(ValueError, match="'layers'"):
        find_blocks(tiny(), blocks="layers")
    with pytest.raises(ValueError, match="'nope'"):
        find_blocks(tiny(), stem=["nope"])
    with pytest.raises(ValueError, match="not a list"):
        find_blocks(tiny(), blocks="head")
    with pytest.raises(ValueError, match="of this model"):
        find_blocks(tiny(), blocks=[nn.Linear(2, 2)])


def test_stem_by_name_module_or_parameter(tiny):
    model = tiny()
    for stem in (["head"], [model.head], [model.head.weight], ["head.weight"]):
        found = find_blocks(model, stem=stem)
        assert ids(found.stem) == ids(model.head.parameters())
        assert ids(found.head) == ids(model.embed.parameters())


def test_shared_weights_are_refused(tiny):
    model = tiny()
    model.blocks[2].inner.weight = model.blocks[0].inner.weight
    with pytest.raises(
        ValueError, match=r"inner.weight of block blocks.2 is also in block blocks.0"
    ):
        find_blocks(model)
    model = tiny()
    model.blocks[3] = model.blocks[0]
    with pytest.raises(ValueError, match="twice"):
        find_blocks(model)
    model = tiny()
    model.head = model.blocks[1].inner
    with pytest.raises(ValueError, match=r"head.weight is also in block blocks.1"):
        find_blocks(model)
