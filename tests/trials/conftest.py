"""A small text."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i * i % 97} blocks of {i * 7 % 31} bytes" for i in range(400)))
    return path
