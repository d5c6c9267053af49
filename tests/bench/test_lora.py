"""lora: adapters train, nothing else moves, and what they compute is the paper's."""

import importlib.util

import pytest
import torch

from bench import memory
from bench.config import resolve
from bench.lora import Lora
from bench.models import model_of, optimizer
from bench.tasks.teacher import TeacherTask
from bench.tasks.text import TextTask
from blocksched import BlockScheduler, extension
from blocksched.checkpoint import load_checkpoint, save_checkpoint

D, N = 16, 3
TINY = {
    "device": "cpu", "dtype": "float32", "dmodel": D, "n_layers": N, "n_heads": 2, "seq_len": 8,
    "batch_size": 2, "val_batches": 1, "lr": 1e-2,
}  # fmt: skip
FUSED = pytest.param(
    True, marks=pytest.mark.skipif(not extension.HAS_CPP, reason="the extension was not built")
)
LORA = Lora(rank=4, alpha=8.0)


class Training:
    """Adapters under training, one batch again and again."""

    def __init__(self, fused: bool, lora: Lora = LORA, kind: type = TextTask, **given) -> None:
        config = resolve({**TINY, **given})
        self.task = kind(config, torch.device("cpu"))
        self.model = model_of(self.task, config, fused, lora)
        self.optimizer = optimizer(self.model, config, fused)
        self.scheduler = BlockScheduler(
            self.model, self.optimizer, lora, total_steps=100, blocks="blocks"
        )
        self.batch = self.task.batch(0)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            inputs, targets = self.batch
            loss = self.task.loss(self.task.forward(self.model, inputs), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step(loss)
            losses.append(loss.item())
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("fused", [False, FUSED])
def test_adapters_train_and_nothing_else_moves(fused):
    made = Training(fused)
    before = made.weights()
    losses = made.steps(8)
    assert losses[-1] < losses[0] - 0.01
    moved = {name for name, now in made.weights().items() if not torch.equal(now, before[name])}
    layers = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert moved == {
        f"blocks.{block}.{layer}.lora_{side}.default.weight"
        for block in range(N)
        for layer in layers
        for side in "AB"
    }
    shapes = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    assert memory.weights(made.model) == 4 * N * sum(4 * (i + o) for i, o in shapes)


@pytest.mark.parametrize("fused", [False, FUSED])
def test_a_layer_is_w_and_alpha_over_rank_times_b_a(fused):
    """Equation 3 of the paper, and the same start as without adapters, since B is 0 there."""
    made = Training(fused)
    plain = made.task.model(fused=False)
    inputs, _ = made.batch
    torch.testing.assert_close(made.model(inputs), plain(inputs))
    made.steps(3)
    adapted = made.model.state_dict()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.startswith("blocks"):
                layer = name.removesuffix(".weight")
                b, a = (adapted[f"{layer}.lora_{side}.default.weight"] for side in "BA")
                weight += 8.0 / 4 * b @ a
    torch.testing.assert_close(made.model(inputs), plain(inputs))
    assert not torch.allclose(made.model(inputs), made.task.model(fused=False)(inputs))


def test_the_start_depends_on_the_seed_alone():
    one = Training(False).weights()
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    two = Training(False).weights()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = Training(False, seed=43).weights()
    name = "blocks.0.mlp.fc1.lora_A.default.weight"
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("fused", [False, FUSED])
def test_a_checkpoint_goes_on_to_the_bit(fused, tmp_path):
    def run(made: Training) -> dict[str, object]:
        return {"model": made.model, "optimizers": made.optimizer, "scheduler": made.scheduler}

    whole, first, second = (Training(fused) for _ in range(3))
    whole.steps(6)
    first.steps(3)
    save_checkpoint(tmp_path, 3, **run(first))
    load_checkpoint(tmp_path, **run(second))
    second.steps(3)
    expected = whole.weights()
    assert all(torch.equal(now, expected[name]) for name, now in second.weights().items())


def test_half_precision_weights():
    made = Training(False, kind=TeacherTask, task="teacher", dtype="bfloat16", n_heads=0)
    before = made.weights()
    losses = made.steps(6)
    assert losses[-1] < losses[0]
    moved = [n for n, now in made.weights().items() if not torch.equal(now, before[n])]
    assert len(moved) == 2 * 2 * N
    assert all("lora" in name for name in moved)


def test_without_peft_the_remedy_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    with pytest.raises(ValueError, match="PEFT, which is missing: pip install"):
        LORA.init(N)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"lr_factor": -1.0}, {"rank": 1.5}])
def test_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lora(**wrong)


def test_its_notes_say_what_runs_in_eager_torch():
    assert str(LORA) == (
        "Lora(rank=4, alpha=8.0, lr_factor=5.0); its MLPs run in eager torch, around the adapters"
    )
