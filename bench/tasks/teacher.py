"""The original experiment: a student finds its way back to the teacher it was disturbed from."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.config import Config
from bench.tasks.parts import NormHead, Stack, generator
from blocksched import FusedMLP


class TeacherTask:
    """Inputs are noise, targets the teacher's outputs; weights are held in the run's dtype."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.info: dict[str, Any] = {}
        self._config = config
        self._dtype = getattr(torch, config.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            teacher = self._build()
        self._teacher = teacher.to(device, self._dtype).requires_grad_(False)
        noise = generator(torch.device("cpu"), config.seed, "student")
        student = copy.deepcopy(teacher).float().cpu()
        with torch.no_grad():
            for parameter in student.parameters():
                step = torch.randn(parameter.shape, generator=noise)
                parameter.add_(step, alpha=config.teacher_noise)
        self._student = student.to(self._dtype).requires_grad_(True)

    def _build(self) -> Stack:
        config = self._config
        blocks: list[nn.Module] = [
            FusedMLP(config.dmodel, config.hidden_mult * config.dmodel, backend="eager")
            for _ in range(config.n_layers)
        ]
        return Stack(nn.Identity(), blocks, NormHead(config.dmodel, config.dmodel))

    def model(self, fused: bool) -> Stack:
        return self._student.copy(fused, self.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self._draw(generator(self.device, self._config.seed, f"batch {step}"))

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        source = generator(self.device, self._config.seed, "validation")
        return [self._draw(source) for _ in range(self._config.val_batches)]

    def _draw(self, source: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (self._config.batch_size, self._config.seq_len, self._config.dmodel)
        inputs = torch.randn(shape, generator=source, device=self.device, dtype=self._dtype)
        with torch.no_grad():
            return inputs, self._teacher(inputs)

    def forward(self, part: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = part(inputs)
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs.float(), targets.float())
