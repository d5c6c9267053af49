"""blocksched: train only the blocks that still matter."""

from blocksched.adamw import AdamW
from blocksched.blocks import Blocks, find_blocks
from blocksched.cache import PrefixCache
from blocksched.compile import compile_blocks
from blocksched.mlp import FusedMLP
from blocksched.scheduler import BlockScheduler
from blocksched.schedules import (
    AutoFreeze,
    Cyclic,
    DynamicSuffix,
    FreezeOut,
    FullUpdate,
    GradES,
    Grow,
    Lisa,
    Payoff,
    Plan,
    Progress,
    RandomSuffix,
    Reading,
    RowSuffix,
    StaticSuffix,
)

__all__ = [
    "AdamW",
    "AutoFreeze",
    "BlockScheduler",
    "Blocks",
    "Cyclic",
    "DynamicSuffix",
    "FreezeOut",
    "FullUpdate",
    "FusedMLP",
    "GradES",
    "Grow",
    "Lisa",
    "Payoff",
    "Plan",
    "PrefixCache",
    "Progress",
    "RandomSuffix",
    "Reading",
    "RowSuffix",
    "StaticSuffix",
    "compile_blocks",
    "find_blocks",
]
__version__ = "0.1.0"
