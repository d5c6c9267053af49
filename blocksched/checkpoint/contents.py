"""What a run is made of, and how it is told from another run."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from blocksched.scheduler import BlockScheduler


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that have state, on one rank."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    scheduler: BlockScheduler

    def shared(self) -> dict[str, Any]:
        """What is the same on all ranks, or shards of the same."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def own(self, extra: Any) -> dict[str, Any]:
        """What is this rank's alone."""
        numbers = numpy.random.get_state(legacy=False)
        return {
            "scheduler": self.scheduler.state_dict(),
            "extra": extra,
            "python": random.getstate(),
            "numpy": {
                **numbers,
                "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()},
            },
            "cpu": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self._cuda()],
        }

    def restore(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Go on from what `shared` and `own` gave."""
        self.model.load_state_dict(shared["model"])
        for optimizer, state in zip(self.optimizers, shared["optimizers"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                for key, value in group.items():
                    if isinstance(value, Tensor):  # lr; torch moves only the state to its device
                        saved[key] = torch.as_tensor(saved[key]).to(value.device)
            optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(own["scheduler"])
        random.setstate(own["python"])
        numpy.random.set_state(own["numpy"])
        torch.set_rng_state(own["cpu"])
        for device, state in zip(self._cuda(), own["cuda"], strict=True):
            torch.cuda.set_rng_state(state, device)

    def parameters(self) -> dict[str, Tensor]:
        """The parameter behind "model/NAME" and "optimizers/NUMBER/state/NUMBER" of `shared`."""
        named = {f"model/{key}": value for key, value in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            held = (p for group in optimizer.param_groups for p in group["params"])
            named |= {f"optimizers/{i}/state/{k}": p for k, p in enumerate(held)}
        return named

    def description(self) -> dict[str, Any]:
        """What has to be the same in a run that loads this one's checkpoint, as plain values."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            "processes": 1 if self.scheduler.ranks is None else self.scheduler.ranks.world,
            "devices": [device.type for device in self._cuda()] or ["cpu"],
            "schedule": str(self.scheduler.schedule),
            "blocks": list(self.scheduler.blocks.names),
            "model": {key: _shape(value) for key, value in self.model.state_dict().items()},
            "optimizers": [
                {
                    "kind": type(optimizer).__name__,
                    "groups": [
                        [names.get(id(p), _shape(p)) for p in group["params"]]
                        for group in optimizer.param_groups
                    ],
                }
                for optimizer in self.optimizers
            ],
        }

    def _cuda(self) -> list[torch.device]:
        devices = {p.device for p in self.model.parameters() if p.is_cuda}
        return sorted(devices, key=lambda device: device.index)


def difference(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """How a saved description differs from this run's, None if it does not."""
    for what in ("processes", "devices", "schedule"):
        if saved[what] != ours[what]:
            return f"{what}: saved {saved[what]}, this run has {ours[what]}"
    for name in [*saved["model"], *ours["model"]]:
        there, here = (d["model"].get(name, "nothing") for d in (saved, ours))
        if there != here:
            return f"model: {name} is {there} in the checkpoint, {here} in this run"
    kinds, our_kinds = ([o["kind"] for o in d["optimizers"]] for d in (saved, ours))
    if kinds != our_kinds:
        return f"optimizers: saved {', '.join(kinds)}, this run has {', '.join(our_kinds)}"
    for i, (there, here) in enumerate(zip(saved["optimizers"], ours["optimizers"], strict=True)):
        if there != here:
            return f"optimizers: number {i} holds other parameters, or in another order"
    if saved["blocks"] != ours["blocks"]:
        return f"blocks: saved {saved['blocks']}, this run has {ours['blocks']}"
    return None


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        sharded = " sharded" if isinstance(value, DTensor) else ""
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{sharded}"
    return type(value).__name__
