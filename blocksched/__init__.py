"""blocksched: train only the blocks that still matter."""

from blocksched.adamw import AdamW
from blocksched.blocks import Blocks, find_blocks
from blocksched.cache import PrefixCache
from blocksched.compile import compile_blocks
from blocksched.mlp import FusedMLP
from blocksched.scheduler import BlockScheduler
from blocksched.schedules import DynamicSuffix, FullUpdate, Plan, Progress, Reading, StaticSuffix

__all__ = [
    "AdamW",
    "BlockScheduler",
    "Blocks",
    "DynamicSuffix",
    "FullUpdate",
    "FusedMLP",
    "Plan",
    "PrefixCache",
    "Progress",
    "Reading",
    "StaticSuffix",
    "compile_blocks",
    "find_blocks",
]
__version__ = "0.1.0"
