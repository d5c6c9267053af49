"""What the benchmark's tests share: a small text, tiny sizes, one thread."""

from pathlib import Path

import pytest

TINY = (
    "--device cpu --backend eager --dmodel 16 --n-layers 4 --seq-len 16 --batch-size 2 --steps 12"
    " --val-batches 1 --static-active-layers 2 --dyn-min-active-layers 2 --dyn-max-active-layers 3"
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = " ".join(f"{i * i % 97} blocks of {i * 7 % 31} bytes" for i in range(400))
    path.write_text(words)
    return path


@pytest.fixture(scope="session")
def tiny(text_file) -> list[str]:
    """Flags of a run that takes a second."""
    return [*TINY.split(), "--data", str(text_file)]
