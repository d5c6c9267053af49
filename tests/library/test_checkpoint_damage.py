"""What is not whole, or not of this run, is refused before anything changes."""

import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import blocksched as bs
from blocksched.checkpoint import CheckpointError
from blocksched.checkpoint.folders import verify
from tests.library.checkpoint_loop import Loop, two_optimizers

FILES = "manifest.json", "manifest.sha256", "model.pt", "optimizers.pt", "rank-00000.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    loop = Loop()
    for step in (1, 2):
        loop.step()
        loop.save(folder, step)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def refused(loop, folder, **arguments):
    """The error of a load, which has to leave all as it was."""
    before = loop.state(), loop.scheduler.state_dict()["steps"], random.getstate()
    numbers = torch.get_rng_state()
    with pytest.raises(CheckpointError) as error:
        loop.load(folder, **arguments)
    assert before == (loop.state(), loop.scheduler.state_dict()["steps"], random.getstate())
    assert torch.equal(numbers, torch.get_rng_state())
    return str(error.value)


def sealed(path, **changes):
    """Change a manifest, and the digests, as someone would who knows how."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    content = json.dumps({**manifest, **changes}).encode()
    (path / "manifest.json").write_bytes(content)
    line = f"{hashlib.sha256(content).hexdigest()}  manifest.json\n"
    (path / "manifest.sha256").write_text(line)


def damage(draw, path, other):
    """Damage one file of the checkpoint `path`; returns what was done, and to which file."""
    file = path / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    kind = draw.choice(("flip", "cut", "append", "delete", "swap", "zero", "move", "foreign"))
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "append":
        content += draw.randbytes(draw.randint(1, 9))
    elif kind == "zero":
        start = draw.randrange(len(content) - 16)
        content[start : start + 16] = bytes(16) if any(content[start : start + 16]) else b"x" * 16
    elif kind == "swap":
        content = (other / file.name).read_bytes()
    elif kind == "move":
        content = (path / draw.choice([name for name in FILES if name != file.name])).read_bytes()
    elif kind == "foreign":
        file = path / f"{draw.choice('abc')}.pt"
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return kind, file.name


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.soak)])
def test_every_damage_is_a_clear_error(saved, tmp_path, count, request):
    draw = random.Random(request.node.name)
    loop = Loop()
    for i in range(count):
        shutil.copytree(saved, tmp_path / str(i))
        newest, older = tmp_path / str(i) / "step-00000002", tmp_path / str(i) / "step-00000001"
        kind, name = damage(draw, newest, older)
        said = refused(loop, tmp_path / str(i))
        assert str(newest) in said
        assert name in said or "manifest.json" in said, (kind, name, said)
        assert "allow_previous=True" in said


def test_every_bit_of_the_manifest_and_its_digest_counts(folder):
    newest = folder / "step-00000002"
    for name in FILES[:2]:
        content = (newest / name).read_bytes()
        for at in range(0, len(content), 1 + len(content) // 100):
            (newest / name).write_bytes(
                content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
            )
            with pytest.raises(CheckpointError, match="does not have the sha256"):
                verify(newest, bool)
        (newest / name).write_bytes(content)
    assert verify(newest, bool)["step"] == 2


def test_the_previous_one_is_used_if_allowed(folder):
    (folder / "step-00000002" / "model.pt").write_bytes(b"")
    expected, loop = Loop(), Loop()
    expected.step()
    with pytest.warns(
        UserWarning,
        match=r"step-00000002.model\.pt must have \d+ bytes, has 0.*loading .*step-00000001",
    ):
        assert loop.load(folder, allow_previous=True).step == 1
    assert loop.state() == expected.state()
    for step in (2, 3):  # the run comes by the damaged step again
        loop.step()
        loop.save(folder, step, keep=1)
    assert Loop().load(folder).step == 3
    assert len(list(folder.glob("step-00000002.left-out-*"))) == 1


def test_where_none_is_whole_the_newest_is_named_and_nothing_moves(folder):
    for step in (1, 2):
        (folder / f"step-0000000{step}" / "model.pt").unlink()
    said = refused(Loop(), folder, allow_previous=True)
    assert "step-00000002/model.pt must be there" in said
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_version_from_the_future(folder):
    sealed(folder / "step-00000002", version=2, run=None)
    assert "has format 2, this one reads 1" in refused(Loop(), folder)


def test_a_renamed_checkpoint(folder):
    (folder / "step-00000002").rename(folder / "step-00000012")
    assert "holds a checkpoint of step 2" in refused(Loop(), folder)


def test_a_file_that_would_run_code(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), folder / "step-00000002" / "optimizers.pt")
    sealed(folder / "step-00000002")
    assert "optimizers.pt must hold tensors, numbers" in refused(Loop(), folder)
    assert not (tmp_path / "ran").exists()


def other_order(model):
    return [torch.optim.AdamW([*model.parameters()][::-1], lr=0.02)]


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=0.02)]


def half(model):
    model.blocks[1].half()
    return sgd(model)


def deeper(model):
    model.extra = nn.Linear(2, 2)
    return sgd(model)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ({"width": 12}, r"model: embed.weight is float32 [16, 8] in the checkpoint, float32 [16,"),
        ({"make": half}, "model: blocks.1.norm.0.weight is float32 [8] in the checkpoint, float"),
        ({"make": deeper}, "model: extra.weight is nothing in the checkpoint, float32 [2, 2]"),
        ({"make": sgd}, "optimizers: saved AdamW, this run has SGD"),
        ({"make": two_optimizers}, "optimizers: saved AdamW, this run has SGD, AdamW"),
        ({"make": other_order}, "number 0 holds other parameters, or in another order"),
        ({"schedule": bs.StaticSuffix(active=2)}, "this run has StaticSuffix(active=2)"),
        ({"blocks": 3}, "this run has ['blocks.0', 'blocks.1', 'blocks.2']"),
    ],
)
def test_another_run(folder, build, said):
    got = refused(Loop(**build), folder)
    assert "step-00000002 is another run's; " in got
    assert said in got


def test_another_number_of_processes(folder):
    manifest = json.loads((folder / "step-00000002" / "manifest.json").read_text())
    sealed(folder / "step-00000002", run={**manifest["run"], "processes": 4})
    assert "processes: saved 4, this run has 1" in refused(Loop(), folder)


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} must name a folder" in refused(Loop(), tmp_path / "file")


@pytest.mark.parametrize("inner", ["", "step-00000002", "step-00000002/model.pt"])
def test_no_permission(saved, inner):
    loop, user = Loop(), os.geteuid()
    with tempfile.TemporaryDirectory() as top:  # others cannot look into pytest's
        folder = shutil.copytree(saved, Path(top) / "copy")
        for path in (Path(top), folder):
            path.chmod(0o755)
        (folder / inner).chmod(0)
        os.seteuid(65534 if user == 0 else user)
        try:
            said = refused(loop, folder)
        finally:
            os.seteuid(user)
            (folder / inner).chmod(0o755)
    assert "Permission denied" in said
    assert str(folder / inner) in said
