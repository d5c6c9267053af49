"""The decisions: which blocks train on which step. Standard library only."""

from blocksched.schedules.autofreeze import AutoFreeze
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
from blocksched.schedules.cyclic import Cyclic
from blocksched.schedules.dynamic_suffix import DynamicState, DynamicSuffix
from blocksched.schedules.freezeout import FreezeOut
from blocksched.schedules.full_update import FullUpdate
from blocksched.schedules.grades import GradES
from blocksched.schedules.grow import Grow
from blocksched.schedules.lisa import Lisa
from blocksched.schedules.payoff import Payoff
from blocksched.schedules.random_suffix import RandomSuffix
from blocksched.schedules.row_suffix import RowSuffix
from blocksched.schedules.static_suffix import StaticSuffix

__all__ = [
    "AutoFreeze",
    "Cyclic",
    "Depth",
    "DynamicState",
    "DynamicSuffix",
    "FreezeOut",
    "FullUpdate",
    "GradES",
    "Grow",
    "Lisa",
    "Measuring",
    "Memoryless",
    "Payoff",
    "Plan",
    "Progress",
    "RandomSuffix",
    "Reading",
    "RowSuffix",
    "Schedule",
    "StaticSuffix",
    "to_plain",
]
