"""blocksched in a loop of one's own: freeze what stopped mattering while fitting noise to noise."""

import torch
from torch import nn

import blocksched as bs

STEPS = 60


def main() -> list[int]:
    """Train; return how many blocks each step updated."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(8)]
    model = nn.Sequential(nn.Linear(4, 32), nn.Sequential(*layers), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = bs.DynamicSuffix(
        min_active=2, max_active=5, warmup_steps=5, probe_every=10, freeze_start_frac=0.2
    )
    scheduler = bs.BlockScheduler(model, optimizer, schedule, total_steps=STEPS, blocks="1")
    active = []
    while not scheduler.done:
        active.append(len(scheduler.plan.active))
        inputs = torch.randn(64, 4)
        loss = (model(inputs) - inputs.prod(-1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    return active


if __name__ == "__main__":
    print("blocks updated:", *main())
