"""AdamW where only a GPU can tell: CUDA graphs, GradScaler, no waiting for the device."""

import pytest
import torch

from blocksched import AdamW, BlockScheduler, DynamicSuffix

pytestmark = pytest.mark.cuda


def weights(seed=0):
    torch.manual_seed(seed)
    shapes = (64, 65), (65,), (7, 3), (20000,)
    return [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]


def draw(params, seed):
    torch.manual_seed(seed)
    return [torch.randn_like(p) for p in params]


def test_a_captured_step_replays_as_the_eager_one():
    params, plain = weights(), weights()
    lr = torch.tensor(1e-2, device="cuda")
    optimizer, other = AdamW(params, lr=lr, capturable=True), AdamW(plain, lr=1e-2)
    static = draw(params, 0)
    for p, g in zip(params, static, strict=True):
        p.grad = g
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def also(seed):
        for p, g in zip(plain, draw(plain, seed), strict=True):
            p.grad = g
        other.step()
        assert all(map(torch.equal, params, plain))

    also(0)
    for seed in (1, 2):
        for g, new in zip(static, draw(params, seed), strict=True):
            g.copy_(new)
        graph.replay()
        also(seed)
    for p, g in zip(params, draw(params, 3), strict=True):  # an eager step after the capture
        p.grad = g
    optimizer.step()
    also(3)
    for g, new in zip(static, draw(params, 4), strict=True):  # and the graph after that
        g.copy_(new)
    lr.fill_(2e-2)
    other.param_groups[0]["lr"] = 2e-2
    graph.replay()
    also(4)


def test_capture_without_capturable_is_an_error():
    params = weights()
    optimizer = AdamW(params)
    for p, g in zip(params, draw(params, 0), strict=True):
        p.grad = g
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_grad_scaler_skips_and_unscales():
    params, plain = weights(), weights()
    optimizer, other = AdamW(params), AdamW(plain)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=100)
    for seed, bad in ((0, False), (1, True), (2, False)):
        scale = scaler.get_scale()
        scaler.scale(torch.zeros((), device="cuda"))
        for p, q, g in zip(params, plain, draw(params, seed), strict=True):
            p.grad, q.grad = g * scale, g.clone()
        if bad:
            params[1].grad[0] = torch.inf
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, params, plain))
    assert scaler.get_scale() == 512.0


def test_a_step_does_not_wait_for_the_device(tiny):
    model = tiny().cuda()
    optimizer = AdamW(model.parameters())
    schedule = DynamicSuffix(min_active=1, max_active=3, probe_every=100, warmup_steps=0)
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=1000)
    tokens = torch.randint(16, (6,), device="cuda")
    for step in range(8):
        loss = torch.nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        if step > 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
        scheduler.step(loss)
