"""The decisions: which blocks train on which step. Standard library only."""

from blocksched.schedules.base import (
    Depth,
    Measuring,
    Memoryless,
    Plan,
    Progress,
    Reading,
    Schedule,
    to_plain,
)
from blocksched.schedules.dynamic_suffix import DynamicState, DynamicSuffix
from blocksched.schedules.full_update import FullUpdate
from blocksched.schedules.static_suffix import StaticSuffix

__all__ = [
    "Depth",
    "DynamicState",
    "DynamicSuffix",
    "FullUpdate",
    "Measuring",
    "Memoryless",
    "Plan",
    "Progress",
    "Reading",
    "Schedule",
    "StaticSuffix",
    "to_plain",
]
