"""The folder of a checkpoint: there as a whole or not at all, read only if no byte has changed.

    folder/step-00000123/manifest.json      format version, step, size and sha256 of every file
                         manifest.sha256    of manifest.json, as `sha256sum -c` reads it
                         ...                the files
    folder/.tmp-...                         one that is being written or deleted, or was

A second checkpoint of the same step is step-00000123.1.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TEMPORARY = ".tmp-"
_MANIFEST, _DIGEST = "manifest.json", "manifest.sha256"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: says which file, what is wrong, what to do."""


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first; none where there is no such folder."""
    with refusing(folder, "name a folder that can be read"):
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
    return [folder / name for name in sorted(filter(_NAME.fullmatch, names), key=_age)[::-1]]


def begin(folder: Path, step: int) -> Path:
    """A new temporary folder in `folder` for the files of a checkpoint; removes what was left."""
    newest = next(iter(found(folder)), None)
    if newest is not None and _age(newest.name)[0] > step:
        raise CheckpointError(
            f"{newest} is of a later step than {step}: load it first, move it away, or save to "
            "another folder"
        )
    with refusing(folder, "name a folder that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)
        temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        temporary.mkdir()
    return temporary


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is on the disk by then."""
    with refusing(path, FREE), path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def publish(temporary: Path, step: int, keep: int, manifest: Mapping[str, Any]) -> Path:
    """Make a temporary folder the newest checkpoint; then delete all but the last `keep`.

    `manifest` holds "files", the `entry` of each by its name, and what else is to be kept.
    """
    folder = temporary.parent
    content = json.dumps({"version": VERSION, "step": step, **manifest}, indent=1).encode()
    with refusing(temporary, FREE):
        _write(temporary / _MANIFEST, content)
        _write(temporary / _DIGEST, _digest_line(content))
        for inner, _, _ in os.walk(temporary):
            _sync(inner)
        same = [_age(path.name)[1] + 1 for path in found(folder) if _age(path.name)[0] == step]
        path = folder / (f"step-{step:08d}" + (f".{max(same)}" if same else ""))
        temporary.rename(path)
        _sync(folder)
        for old in found(folder)[keep:]:
            shutil.rmtree(old.rename(folder / f"{_TEMPORARY}{old.name}"))
    return path


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it counts no more."""
    with refusing(path, "stand in a folder that can be written"):
        return path.rename(path.with_name(f"{path.name}.left-out-{secrets.token_hex(4)}"))


def verify(path: Path, mine: Callable[[str], bool]) -> dict[str, Any]:
    """The manifest of the checkpoint `path`, once its files are those that were written.

    `mine` says by a file's name whether its content is to be read too, not only its size.
    """
    manifest: dict[str, Any] = json.loads(_whole_manifest(path))
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"{path / _MANIFEST} has format {manifest['version']}, this one reads {VERSION}: "
            "load it with the blocksched that wrote it, or a later one"
        )
    if manifest["step"] != _age(path.name)[0]:
        raise CheckpointError(
            f"{path} holds a checkpoint of step {manifest['step']}, so somebody renamed it: give "
            "it back its name"
        )
    files = manifest["files"]
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    for name in sorted(there - {*files, _MANIFEST, _DIGEST}):
        raise CheckpointError(f"{path / name} is not of this checkpoint: move it away")
    for name, wanted in files.items():
        _compare(path / name, wanted, mine(name))
    return manifest


@contextlib.contextmanager
def refusing(path: Path, must: str) -> Iterator[None]:
    """Turns what the system says of `path` into a CheckpointError; `must` is the rule."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} must {must}: {error.strerror}") from error


FREE = "be written whole, so free space or save elsewhere; earlier checkpoints are as they were"
_REMEDY = "go on from another checkpoint, or restore this one from a copy"


def _whole_manifest(path: Path) -> bytes:
    with refusing(path, f"be a checkpoint that can be read; if not, {_REMEDY}"):
        content = (path / _MANIFEST).read_bytes()
        if (path / _DIGEST).read_bytes() != _digest_line(content):
            raise CheckpointError(
                f"{path / _MANIFEST} does not have the sha256 in {_DIGEST}, one of the two is "
                f"damaged: {_REMEDY}"
            )
    return content


def _compare(path: Path, wanted: Mapping[str, Any], content: bool) -> None:
    with refusing(path, f"be there and readable; if not, {_REMEDY}"):
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(
                f"{path} must have {wanted['bytes']} bytes, has {size}: {_REMEDY}"
            )
        if content:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != wanted["sha256"]:
                raise CheckpointError(
                    f"{path} must have the sha256 {wanted['sha256']}, has {digest}, so it is "
                    f"damaged or another's: {_REMEDY}"
                )


def _age(name: str) -> tuple[int, int]:
    """Step and number among those of the same step."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _digest_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {_MANIFEST}\n".encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: str | Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
