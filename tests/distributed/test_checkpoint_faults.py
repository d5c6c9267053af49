"""What goes wrong on one rank is raised on all, and changes nothing on any."""

import hashlib
import json
import os
import pickle
import resource
import warnings
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import StorageMeta

from blocksched.checkpoint import CheckpointError, folders, load_checkpoint, save_checkpoint
from tests.distributed.test_checkpoint import Loop

KINDS = pytest.mark.parametrize("kind", ["ddp", "fsdp"])


def save_both(rank, kind, folder):
    """Checkpoints of steps 1 and 2; returns what both ranks held then."""
    loop = Loop(rank, kind)
    states = []
    for step in (1, 2):
        states.append(loop.step()[-1])
        save_checkpoint(folder, step, **loop.parts())
    loop.scheduler.close()
    return states


def save(rank, kind, folder, wrong):
    """Saves step 3 with something wrong on rank 1; returns what was said."""
    loop = Loop(rank, kind)
    load_checkpoint(folder, **loop.parts())
    loop.step()
    extra, limits = None, resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1 and wrong == "extra":
        extra = object()
    if rank == 1 and wrong == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        save_checkpoint(folder, 3, **loop.parts(), extra=extra)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        loop.scheduler.close()


def load(rank, kind, folder, allow, unlike=False):
    """Loads; returns what was said or loaded, and what the rank then holds."""
    loop = Loop(rank, kind)
    before, said = loop.state(), ""
    if unlike and rank == 1:
        folder = f"{folder}-of-rank-1"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            said = load_checkpoint(folder, **loop.parts(), allow_previous=allow).step
        except CheckpointError as error:
            said = str(error)
            assert loop.state() == before
    loop.scheduler.close()
    return said, [str(warning.message) for warning in warned], loop.state()


def write_too_much(rank, kind, folder):
    """Saves step 3 where rank 1 has no room for its shards, but for all else."""
    loop = Loop(rank, kind)
    load_checkpoint(folder, **loop.parts())
    writer, limits = folders.entry, resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_full(path):
        done = writer(path)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return done

    folders.entry = then_full
    try:
        save_checkpoint(folder, 3, **loop.parts())
    except CheckpointError as error:
        return str(error)
    finally:
        folders.entry = writer
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        loop.scheduler.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@KINDS
def test_a_save_that_fails_on_one_rank_fails_on_both(ranks, tmp_path, kind):
    states = ranks(save_both, kind, str(tmp_path))
    for wrong, reason in (("extra", "must hold tensors, numbers"), ("full", "File too large")):
        said = ranks(save, kind, str(tmp_path), wrong)
        assert reason in said[1]
        assert said[0] == f"rank 1: CheckpointError: {said[1]}"
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
    if kind == "fsdp":
        said = ranks(write_too_much, kind, str(tmp_path))
        assert all("shards must be written whole" in text for text in said)
        assert all("rank 1: [Errno 27] File too large" in text for text in said)
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
    loaded = ranks(load, kind, str(tmp_path), False)
    assert loaded == [(2, [], state[1]) for state in states]


@KINDS
def test_damage_to_what_one_rank_reads_is_refused_by_both(ranks, tmp_path, kind):
    states = ranks(save_both, kind, str(tmp_path))
    newest = tmp_path / "step-00000002"
    name = "shards/__1_0.distcp" if kind == "fsdp" else "rank-00001.pt"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    for text, warned, _ in ranks(load, kind, str(tmp_path), False):
        assert f"{newest / name} must have the sha256" in text
        assert "pass allow_previous=True" in text
        assert warned == []
    again = ranks(load, kind, str(tmp_path), True)
    assert [(step, state) for step, _, state in again] == [(1, state[0]) for state in states]
    assert [len(warned) for _, warned, _ in again] == [1, 0]
    assert "loading" in again[0][1][0]
    assert names(tmp_path)[0] == "step-00000001"
    assert names(tmp_path)[1].startswith("step-00000002.left-out-")


def test_ranks_that_see_different_folders(ranks, tmp_path):
    ranks(save_both, "ddp", str(tmp_path / "a"))
    for text, _, _ in ranks(load, "ddp", str(tmp_path / "a"), False, True):
        assert "must be one folder that all ranks see" in text


def test_shards_are_not_loaded_into_replicas(ranks, tmp_path):
    ranks(save_both, "ddp", str(tmp_path))
    for text, _, _ in ranks(load, "fsdp", str(tmp_path), False):
        assert "float32 [16, 6] in the checkpoint, float32 [16, 6] sharded in this run" in text


def forge(folder, content):
    """Put `content` in the place of .metadata, with digests to match."""
    for path in Path(folder).glob("step-*"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "shards" / ".metadata").write_bytes(content)
        manifest["files"]["shards/.metadata"] = folders.entry(path / "shards" / ".metadata")
        folders._write(path / "manifest.json", text := json.dumps(manifest).encode())
        line = f"{hashlib.sha256(text).hexdigest()}  manifest.json\n"
        (path / "manifest.sha256").write_text(line)


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (self.made,)


def test_metadata_that_would_run_code(ranks, tmp_path):
    ranks(save_both, "fsdp", str(tmp_path / "a"))
    forge(tmp_path / "a", pickle.dumps(Evil(str(tmp_path / "ran"))))
    for text, _, _ in ranks(load, "fsdp", str(tmp_path / "a"), False):
        assert "asks for posix.mkdir" in text
    assert not (tmp_path / "ran").exists()


def test_metadata_that_calls_a_tensor_something_else(ranks, tmp_path):
    """torch would unpickle it."""
    ranks(save_both, "fsdp", str(tmp_path))
    path = tmp_path / "step-00000002" / "shards" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = "optimizers/0/state/3/exp_avg"
    metadata.state_dict_metadata[name] = StorageMeta()
    forge(tmp_path, pickle.dumps(metadata))
    for text, _, _ in ranks(load, "fsdp", str(tmp_path), False):
        assert f"must have {name} as a tensor of shape" in text
