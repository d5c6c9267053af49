"""The decisions need nothing but the standard library."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "blocksched" / "schedules").rglob("*.py"))


def foreign(source):
    """The modules that `source` imports from elsewhere, imports inside functions included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return [
        name
        for name in names
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not f"{name}.".startswith("blocksched.schedules.")
    ]


def test_the_files_are_found():
    assert len(FILES) >= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_standard_library(path):
    assert foreign(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch import Tensor",
        "import numpy",
        "from blocksched import scheduler",
        "from blocksched.schedules_other import x",
        "from . import base",
        "def f():\n    import torch",
        "if TYPE_CHECKING:\n    import torch",
    ],
)
def test_the_check_can_fail(planted):
    source = FILES[0].read_text() + "\n" + planted + "\n"
    assert len(foreign(source)) == 1
