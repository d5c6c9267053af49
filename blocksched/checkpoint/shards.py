"""Tensors of which every rank holds a part (DTensor), through torch.distributed.checkpoint.

They go by flat names of our own. torch's get_optimizer_state_dict would leave out the moments of
frozen parameters on load (pytorch#192202), and takes an optimizer step to find out what there is.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from blocksched.checkpoint.folders import FREE, CheckpointError, refusing

FOLDER = "shards"


def take_out(value: Any, like: Mapping[str, Tensor]) -> tuple[Any, dict[str, DTensor]]:
    """`value` with an empty tensor on the meta device in the place of each DTensor, and those.

    They are named by the keys that lead to them, joined by slashes. `like` holds, by the beginning
    of a name, the parameter that a tensor has to be shaped like.
    """
    taken: dict[str, DTensor] = {}

    def take(name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.shape != _owner(name, like).shape:
            raise CheckpointError(
                f"{name} is sharded but not shaped like its parameter, which this format cannot "
                "keep: use an optimizer whose sharded state is, such as AdamW"
            )
        taken[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _map(take, value), taken


def targets(value: Any, like: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """`value`, as `take_out` left it, with a tensor of zeros for each that it took, and those.

    They are sharded as their parameters in `like` are.
    """
    missing: dict[str, Tensor] = {}

    def target(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            tensor = missing[name] = torch.zeros_like(_owner(name, like), dtype=tensor.dtype)
        return tensor

    return _map(target, value), missing


def write(taken: Mapping[str, DTensor], folder: Path, group: Any) -> None:
    """Write this rank's shards; all ranks of `group` call it, and it fails on all or none."""
    try:
        writer = _Writer(folder, single_file_per_rank=True, sync_files=False)
        save(dict(taken), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # not an Exception
        raise CheckpointError(f"{folder} must {FREE}: {_why(error)}") from error


def read(missing: dict[str, Any], reader: "Reader", group: Any) -> None:
    """Fill the tensors `missing` from their shards; all ranks of `group` call it."""
    try:
        load(missing, storage_reader=reader, process_group=group)
    except CheckpointException as error:  # not an Exception
        raise CheckpointError(f"{reader.path} must be readable: {_why(error)}") from error


def _why(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())


def written(folder: Path, rank: int) -> list[Path]:
    """The files that `write` wrote on this rank."""
    return [*folder.glob(f"__{rank}_*"), *(folder.glob(".metadata") if rank == 0 else [])]


def reads(name: str, rank: int) -> bool:
    """Whether `rank` reads the file to verify it: of the shards it is those it wrote."""
    return not name.startswith(f"{FOLDER}/__") or name.startswith(f"{FOLDER}/__{rank}_")


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        return None  # it would name the temporary folder


class Reader(FileSystemReader):
    """Reads the shards in `folder`; `.metadata`, a pickle, as what it has to be and no more."""

    def __init__(self, folder: Path, missing: Mapping[str, Tensor]) -> None:
        super().__init__(folder)
        path = folder / ".metadata"
        with refusing(path, "be readable"), path.open("rb") as file:
            self._metadata: Metadata = _Unpickler(file).load()
        for name, tensor in missing.items():
            saved = self._metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != tensor.shape:
                raise CheckpointError(  # torch would unpickle what is no tensor
                    f"{path} must have {name} as a tensor of shape {list(tensor.shape)}: it is not "
                    "what was saved, load another checkpoint"
                )

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise CheckpointError(
            f".metadata must hold plain descriptions of tensors, asks for {module}.{name}, so "
            "blocksched did not write it: load another"
        )


_METADATA = "torch.distributed.checkpoint.metadata"
_PLAIN = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


def _owner(name: str, like: Mapping[str, Tensor]) -> Tensor:
    """The parameter that the tensor `name` belongs to: "optimizers/0/state/3/exp_avg" to
    "optimizers/0/state/3", "model/x" to itself."""
    parts = name.split("/")
    return like[name if parts[0] == "model" else "/".join(parts[:4])]


def _map(change: Callable[[str, Tensor], Tensor], value: Any, name: str = "") -> Any:
    """`value` with `change` done to every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # an OrderedDict of a module's state has attributes
        for key in value:
            changed[key] = _map(change, value[key], f"{name}/{key}" if name else str(key))
        return changed
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, v, f"{name}/{i}") for i, v in enumerate(value))
    return value
