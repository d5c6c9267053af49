"""Files of tensors and plain values, which nobody needs pickle's freedom to read."""

import pickle
from pathlib import Path
from typing import Any

import torch

from blocksched.checkpoint import folders
from blocksched.checkpoint.folders import CheckpointError

_PLAIN = (
    "must hold tensors, numbers, strings, lists, tuples and dicts only, or nobody could load it "
    "safely: pass extra= and custom state as those"
)


def write(path: Path, value: Any) -> dict[str, Any]:
    """Write a file that `read` reads; returns what the manifest says of it."""
    with folders.refusing(path, folders.FREE):
        try:
            with path.open("wb") as file:
                torch.save(value, file)
        except RuntimeError as error:  # of torch's writer, which goes on after the file's own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path.name} {_PLAIN} ({error})") from error
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path.name} {_PLAIN} ({error})") from error
    return folders.entry(path)


def read(path: Path) -> Any:
    """What `write` wrote, on the CPU."""
    with folders.refusing(path, "be readable"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} {_PLAIN} ({error})") from error
