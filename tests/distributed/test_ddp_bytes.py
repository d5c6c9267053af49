"""How many bytes of gradients DDP sends while few blocks train, by DDP's default buckets."""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import blocksched as bs
from blocksched.distributed import prepare_ddp


def size(parameters):
    return sum(p.nbytes for p in parameters)


def spy(monkeypatch):
    """The bytes of each all-reduce from now on."""
    sent = []
    inner = distributed.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return inner(tensor, *args, **kwargs)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    return sent


def gpt2(_rank, width):
    """For 3 and 12 active blocks of 12: the bytes of block gradients that were sent, those of all
    block gradients in the buckets that were, and those of the active blocks."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=12, n_embd=width, vocab_size=512, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters())
    tokens = torch.randint(512, (1, 2))
    found = {}
    for k in (3, 12):
        scheduler = bs.BlockScheduler(wrapped, optimizer, bs.StaticSuffix(active=k), total_steps=9)
        blocks = scheduler.blocks
        traffic = prepare_ddp(wrapped, scheduler)
        before = traffic.bytes
        with pytest.MonkeyPatch.context() as patch:
            sent = spy(patch)
            wrapped(tokens).logits.mean().backward()
        assert sum(sent) == traffic.bytes - before
        others = [*blocks.head, *(blocks.stem if k == 12 else [])]
        in_blocks = {id(p) for block in blocks.parameters for p in block}
        buckets = [b.parameters() for b in wrapped.reducer._get_zeros_like_grad_buckets()]
        whole = [p for b in buckets if any(q.requires_grad for q in b) for p in b]
        found[k] = (
            sum(sent) - size(others),
            size(p for p in whole if id(p) in in_blocks),
            sum(map(size, blocks.parameters[-k:])),
        )
        scheduler.close()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("width", "unpacked"), [(384, 0.354), pytest.param(768, 0.25, marks=pytest.mark.soak)]
)
def test_a_quarter_of_the_blocks_costs_a_quarter_of_the_bytes(width, unpacked, ranks):
    found, other = ranks(gpt2, width)
    assert found == other
    sent, in_their_buckets, active = found[3]
    everything = found[12][0]
    assert everything == found[12][1] == found[12][2]
    assert sent == active <= 0.3 * everything
    assert in_their_buckets / everything == pytest.approx(unpacked, abs=0.005)
