"""The folder of a study and what is kept in it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.config import UserError
from bench.results import write


def make(folder: Path) -> None:
    """Make a folder. Raises UserError, before any work, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be used ({error.strerror}): give a folder that can be written"
        ) from None


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of the folder. Raises UserError if it cannot be; what was there then stays."""
    try:
        write(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room and run it again, or choose "
            "another place with --out"
        ) from None
