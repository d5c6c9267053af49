"""lora: every block trains, through adapters of low rank (arXiv 2106.09685) that PEFT puts in."""

import dataclasses
import importlib.util

import torch

from bench.tasks.parts import Stack
from blocksched import FusedMLP
from blocksched.schedules import Depth, FullUpdate
from blocksched.schedules.numbers import check_numbers, number

_LINEAR = r"blocks\.\d+\..*\b(qkv|proj|fc1|fc2)"  # the head has a proj too, and is left alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(FullUpdate):
    """full_update of adapters; all other weights, stem and head too, stay as they are.

    The paper adapts attention alone, and starts from a model that can do most of the task already.
    """

    rank: int = number(8, "rank of the adapters in each linear layer of the blocks", ge=1)
    alpha: float = number(16.0, "the adapters' part is scaled by alpha / rank", gt=0)
    # Preset small, task finetune, rank 8, after 120 steps: 1.801 with 2.5, 1.759 with 5 and
    # 1.877 with 10; full_update ends at 1.660.
    lr_factor: float = number(5.0, "its learning rate is so many times --lr", gt=0)

    def __post_init__(self) -> None:
        check_numbers(self)

    def __str__(self) -> str:
        return f"{self!r}; its MLPs run in eager torch, around the adapters"

    def init(self, n_blocks: int) -> Depth:
        """Raises ValueError if PEFT is missing."""
        if importlib.util.find_spec("peft") is None:
            raise ValueError("its adapters come from PEFT, which is missing: pip install peft")
        return super().init(n_blocks)


def lora_model(stack: Stack, lora: Lora, seed: int) -> Stack:
    """`stack` itself, with adapters in the blocks' linear layers as all that trains.

    A model with them computes at first what it did without. A FusedMLP that insisted on the
    extension calls its layers one by one instead.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for module in stack.modules():
        if isinstance(module, FusedMLP):
            module.backend = "eager"
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_LINEAR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, stack)
    return stack
