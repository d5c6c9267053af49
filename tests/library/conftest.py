"""`fresh_compiler`: for tests that compile."""

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    """What is compiled, and the limit that compile_blocks sets, are forgotten."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch.compiler.reset()
