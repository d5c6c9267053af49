"""The frozen-prefix cache: the same bits from fewer forwards, and off where none are promised."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import blocksched.cache
from blocksched import BlockScheduler, DynamicSuffix, PrefixCache, StaticSuffix, compile_blocks
from blocksched.schedules.base import Plan

ROOM = 1 << 20
BATCHES = 3  # of an epoch
ONE = 6 * 8 * 4  # bytes that the tiny model's hidden state takes, 192


@pytest.fixture(autouse=True)
def times_never_decide(monkeypatch):
    """The tiny model's blocks are quicker than any look-up."""
    monkeypatch.setattr(blocksched.cache, "_SAMPLES", 10**6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boundaries(StaticSuffix):
    """The boundary of each step, the last one for good."""

    at: tuple[int, ...] = ()
    active: int = 1

    def plan(self, state, progress):
        boundary = self.at[min(progress.step, len(self.at) - 1)]
        return Plan(tuple(range(boundary, state.n_blocks)), phase="suffix", freezing=True)


class Counted:
    """Calls of each block's inner linear layer, without a hook."""

    def __init__(self, model):
        self.calls = [0] * len(model.blocks)
        for i, block in enumerate(model.blocks):
            block.inner.forward = self.counting(i, block.inner.forward)

    def counting(self, i, forward):
        def count(x):
            self.calls[i] += 1
            return forward(x)

        return count


def run(model, schedule, steps, cache=None, between=None):
    """Train on three batches in turn; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=steps, cache=cache)
    losses = []
    for step in range(steps):
        loss = model.loss(step % BATCHES)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        losses.append(loss.item())
        if between is not None:
            between(step)
    scheduler.close()
    return losses


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_static_suffix_computes_its_prefix_once_a_batch(tiny, tmp_path, where):
    model, plain = tiny(), tiny()
    counted = Counted(model)
    cache = PrefixCache(ROOM, tmp_path / "kept" if where == "file" else None)
    schedule = StaticSuffix(active=2)
    told = []
    losses = run(model, schedule, 12, cache, lambda _: told.append((cache.hits, cache.off)))
    assert losses == run(plain, schedule, 12)
    assert same(model.state_dict(), plain.state_dict())
    assert told[-1] == (9, None)
    assert counted.calls == [3, 3, 12, 12]
    assert cache.misses == 3


def test_a_boundary_that_moves_up_goes_on_from_what_was_kept(tiny):
    model, plain = tiny(), tiny()
    counted, schedule = Counted(model), Boundaries(at=(1, 1, 1, 3))
    cache = PrefixCache(ROOM)
    assert run(model, schedule, 12, cache) == run(plain, schedule, 12)
    assert same(model.state_dict(), plain.state_dict())
    assert counted.calls == [3, 6, 6, 12]


@pytest.mark.parametrize("seed", range(6))
def test_any_walk_of_the_boundary_gives_the_bits_of_a_run_without(tiny, seed):
    at = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(seed))
    at = at.repeat_interleave(torch.tensor([1, 2, 5, 9] * 10))[:60]
    model, plain = tiny(), tiny()
    schedule = Boundaries(at=tuple(at.tolist()))
    cache = PrefixCache(ROOM)
    assert run(model, schedule, 60, cache) == run(plain, schedule, 60)
    assert same(model.state_dict(), plain.state_dict())
    assert cache.hits > 0


def test_probes_drop_what_their_updates_make_stale(tiny):
    schedule = DynamicSuffix(
        min_active=1, max_active=2, warmup_steps=2, probe_every=8, refresh_every=0,
        freeze_start_frac=0.1, final_full_frac=0.1,
    )  # fmt: skip
    model, plain, cache = tiny(), tiny(), PrefixCache(ROOM)
    assert run(model, schedule, 40, cache) == run(plain, schedule, 40)
    assert same(model.state_dict(), plain.state_dict())
    assert cache.hits > 0


@pytest.mark.parametrize("what", ["blocks.0.inner.weight", "embed.weight", "buffer"])
def test_a_weight_written_by_somebody_else_makes_it_stale(tiny, what):
    def write(model):
        tensors = dict(model.named_parameters()) | {"buffer": model.blocks[0].shift}
        with torch.no_grad():
            tensors[what].add_(0.5)

    models, cache = (tiny(), tiny()), PrefixCache(ROOM)
    for model in models:
        model.blocks[0].register_buffer("shift", torch.zeros(8))
        block = model.blocks[0]
        block.norm.forward = lambda x, block=block: x + block.shift
    losses = [
        run(model, StaticSuffix(active=2), 12, kept,
            lambda step, model=model: write(model) if step == 6 else None)
        for model, kept in zip(models, (cache, None), strict=True)
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert (cache.misses, cache.hits) == (6, 6)


def test_a_tied_embedding_trains_and_feeds_the_prefix_so_nothing_can_be_kept(tiny):
    model, plain, cache, off = tiny(tied=True), tiny(tied=True), PrefixCache(ROOM), []
    schedule = StaticSuffix(active=2)
    losses = run(model, schedule, 12, cache, lambda _: off.append(cache.off))
    assert losses == run(plain, schedule, 12)
    assert (cache.misses, cache.hits) == (1, 0)
    assert "feeds the prefix" in off[0]


def test_what_does_not_fit_is_computed(tiny):
    model, plain, cache = tiny(), tiny(), PrefixCache(2 * ONE + 63)
    schedule = StaticSuffix(active=2)
    assert run(model, schedule, 12, cache) == run(plain, schedule, 12)
    assert (cache.misses, cache.hits) == (3 + 3, 6)


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_goes_past_it(tiny, training):
    model, cache, outputs = tiny(), PrefixCache(ROOM), []
    counted = Counted(model)

    def evaluate(_step):
        model.train(training)
        with torch.no_grad():
            outputs.append(model.loss(0))
        model.train()

    run(model, StaticSuffix(active=2), 6, cache, evaluate)
    assert counted.calls == [3 + 6, 3 + 6, 12, 12]


def test_nothing_is_skipped_where_frozen_blocks_draw_random_numbers(tiny):
    model, off, cache = tiny(), [], PrefixCache(ROOM)
    model.blocks[1].norm = nn.Dropout(0.5)
    run(model, StaticSuffix(active=2), 6, cache, lambda _: off.append(cache.off))
    assert (cache.misses, cache.hits) == (1, 0)
    assert "dropout" in off[0]


def test_dropout_above_the_boundary_draws_the_same_numbers(tiny):
    runs = []
    for cache in (PrefixCache(ROOM), None):
        model = tiny()
        model.blocks[3].norm = nn.Dropout(0.5)
        torch.manual_seed(5)
        runs.append(run(model, StaticSuffix(active=2), 12, cache))
    assert runs[0] == runs[1]


class Scaled(nn.Module):
    """Blocks with something before or between them, or whose outputs are used again."""

    def __init__(self, tiny, kind):
        super().__init__()
        self.kind = kind
        self.scales = nn.Parameter(torch.ones(4))
        inner = tiny()
        self.embed, self.blocks, self.head = inner.embed, inner.blocks, inner.head
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.kind == "norm":
            x = self.norm(x)
        trace = []
        for i, block in enumerate(self.blocks):
            if self.kind == "scales":
                x = x * self.scales[i]
            if self.kind == "in place" and i == 2:
                x.add_(1.0)
            if self.kind == "twice" and i == 1:
                x = self.blocks[0](x)
            x = block(x)
            trace.append(x)
        x = self.head(self.norm(x))
        return x + trace[0].mean() if self.kind == "uses" else x


def train(model, cache, steps=9, off=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = BlockScheduler(
        model, optimizer, StaticSuffix(active=2), total_steps=steps, blocks="blocks", cache=cache
    )
    for step in range(steps):
        tokens = torch.randint(16, (6,), generator=torch.Generator().manual_seed(step % BATCHES))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        if off is not None:
            off.append(cache.off)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["scales", "norm"])
def test_what_trains_and_feeds_or_changes_the_prefix_is_seen(tiny, kind):
    torch.manual_seed(0)
    model = Scaled(tiny, kind)
    plain, cache, off = copy.deepcopy(model), PrefixCache(ROOM), []
    assert same(train(model, cache, off=off), train(plain, None))
    assert cache.hits == 0
    assert "acts between its blocks" in off[-1]


def test_what_is_kept_stands_apart_from_what_the_model_writes_to(tiny):
    model, plain, cache = Scaled(tiny, "in place"), Scaled(tiny, "in place"), PrefixCache(ROOM)
    assert same(train(model, cache), train(plain, None))
    assert cache.hits == 6


def test_blocks_that_run_twice_are_not_skipped(tiny):
    model, plain, cache, off = Scaled(tiny, "twice"), Scaled(tiny, "twice"), PrefixCache(ROOM), []
    assert same(train(model, cache, off=off), train(plain, None))
    assert cache.hits == 0
    assert "once each" in off[-1]


def test_a_model_that_uses_a_skipped_output_elsewhere_is_an_error(tiny):
    with pytest.raises(RuntimeError, match="returned NaN when frozen blocks were skipped"):
        train(Scaled(tiny, "uses"), PrefixCache(ROOM))


def test_hooks_inside_the_prefix_would_miss_what_is_skipped(tiny):
    model, off, cache = tiny(), [], PrefixCache(ROOM)
    model.blocks[1].inner.register_forward_hook(lambda *_: None)
    run(model, StaticSuffix(active=2), 6, cache, lambda _: off.append(cache.off))
    assert cache.hits == 0
    assert "hooked" in off[-1]


def test_it_turns_itself_off_where_looking_up_takes_longer(tiny, monkeypatch):
    monkeypatch.setattr(blocksched.cache, "_SAMPLES", 3)
    clock = iter(range(10**6))
    model, plain, off, cache = tiny(), tiny(), [], PrefixCache(ROOM)
    # every look at the clock is a second later: computing takes 1, looking up and skipping 1 + 1
    monkeypatch.setattr(cache, "now", lambda: float(next(clock)))
    schedule = StaticSuffix(active=2)
    losses = run(model, schedule, 12, cache, lambda _: off.append(cache.off))
    assert losses == run(plain, schedule, 12)
    assert off[4] is None
    assert off[5] == "looking up takes 2000.00 ms, the prefix 1000.00 ms"


def test_an_exception_in_the_forward_leaves_the_model_as_it_was(tiny):
    model, cache = tiny(), PrefixCache(ROOM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=5, cache=cache)
    with pytest.raises(IndexError):
        model(torch.tensor([99]))
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_copies_and_pickles_of_the_model_go_without_it(tiny):
    model, cache = tiny(), PrefixCache(ROOM)
    run(model, StaticSuffix(active=2), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=5, cache=cache)
    model.loss(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = cache.hits, cache.misses
        twin.loss(0)
        assert (cache.hits, cache.misses) == before
    model.loss(0)
    assert cache.hits == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(tiny, reentrant):
    runs = []
    for cache in (PrefixCache(ROOM), None):
        model = tiny()
        model.reentrant = reentrant
        runs.append(run(model, StaticSuffix(active=2), 9, cache))
        assert cache is None or cache.hits == 6
    assert runs[0] == runs[1]


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(ValueError, match="limit_bytes must be > 0, got 0"):
        PrefixCache(0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_of_compiled_blocks(tiny):
    runs = []
    for cache in (PrefixCache(ROOM), None):
        model = tiny()
        compile_blocks(model, backend="eager")
        runs.append(run(model, Boundaries(at=(1, 1, 1, 3)), 9, cache))
        assert cache is None or cache.hits == 6
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.ones(2, 3), {}), (torch.ones(3, 2), {})),
        ((torch.ones(4), {}), (torch.ones(4).view(torch.int32), {})),
        ((torch.ones(4), {"scale": 2.0}), (torch.ones(4), {"scale": 3.0})),
        ((torch.ones(4), {"a": 1}), (torch.ones(4), {"b": 1})),
    ],
)
def test_calls_that_differ_in_anything_are_other_batches(one, other):
    device = torch.device("cpu")
    prints = [blocksched.cache._fingerprint(call, device) for call in (one, other, one)]
    assert prints[0] == prints[2] != prints[1]
    with torch.autocast("cpu"):
        assert blocksched.cache._fingerprint(one, device) != prints[0]
    assert blocksched.cache._fingerprint((*one, object()), device) is None


def test_copies_carry_no_live_cache(tiny):
    model, cache = tiny(), PrefixCache(ROOM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=5, cache=cache)
    twin = copy.deepcopy(model)
    owners = [getattr(hook, "__self__", None) for hook in twin._forward_pre_hooks.values()]
    doors = [owner for owner in owners if isinstance(owner, blocksched.cache._Door)]
    assert [door._cache for door in doors] == [None]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_weight_that_is_frozen_for_good_counts_too(tiny, replaced):
    losses = []
    for cache in (PrefixCache(ROOM), None):
        model = tiny()
        weight = model.embed.weight.requires_grad_(False)

        def write(step, weight=weight):
            if step == 6 and replaced:
                weight.data = weight + 0.5
            elif step == 6:
                weight.add_(0.5)

        losses.append(run(model, StaticSuffix(active=2), 12, cache, write))
    assert losses[0] == losses[1]
