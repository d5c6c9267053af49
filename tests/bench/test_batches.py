"""The tasks: batches depend on seed and step alone, models start alike, the corpus is split."""

import types

import pytest
import torch

from bench.config import Config
from bench.tasks.corpus import load_corpus
from bench.tasks.teacher import TeacherTask
from bench.tasks.text import TextTask

CPU = torch.device("cpu")
SIZES = types.MappingProxyType(
    {"dmodel": 16, "n_layers": 3, "seq_len": 8, "batch_size": 2, "val_batches": 3}
)


@pytest.fixture(params=["text", "teacher", "teacher_bf16"])
def make(request, text_file):
    """A function: seed -> a fresh task of one kind."""
    dtype = "bfloat16" if request.param == "teacher_bf16" else "float32"
    kind = TextTask if request.param == "text" else TeacherTask

    def task(seed: int = 1, **flags):
        given = SIZES | {"dtype": dtype, "data": str(text_file)} | flags
        return kind(Config(seed=seed, **given), CPU)

    return task


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_batches_depend_on_seed_and_step_alone(make):
    one, two = make(), make()
    forward = [one.batch(t) for t in range(5)]
    torch.manual_seed(99)  # the global generator plays no part
    for t in (3, 0, 4, 1, 2):
        two.validation()
        assert same(two.batch(t), forward[t])
        torch.rand(3)
    for t in range(1, 5):
        assert not torch.equal(forward[t][0], forward[0][0])


def test_batches_depend_on_the_seed(make):
    assert not torch.equal(make(seed=2).batch(0)[0], make(seed=1).batch(0)[0])


def test_a_task_leaves_the_global_generator_alone(make):
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    make().batch(0)
    assert torch.equal(torch.rand(2), wanted)


def test_models_start_alike_and_apart(make):
    task = make()
    one, two = task.model(fused=False), task.model(fused=False)
    assert same(one.parameters(), two.parameters())
    with torch.no_grad():
        next(one.parameters()).add_(1.0)
    assert same(two.parameters(), task.model(fused=False).parameters())
    assert not same(make(seed=2).model(fused=False).parameters(), two.parameters())
    assert all(p.requires_grad for p in two.parameters())


def test_validation_is_the_same_on_every_call(make):
    task = make()
    one, two = task.validation(), task.validation()
    assert len(one) == SIZES["val_batches"]
    for a, b in zip(one, two, strict=True):
        assert same(a, b)
        assert a[0].shape[:2] == (SIZES["batch_size"], SIZES["seq_len"])
    assert not torch.equal(one[0][0], one[1][0])
    assert not any(torch.equal(one[0][0], task.batch(t)[0]) for t in range(20))


def test_teacher_and_student():
    flags = SIZES | {"dtype": "float32", "teacher_noise": 0.0}
    for noise in (0.0, 0.02):
        task = TeacherTask(Config(**flags | {"teacher_noise": noise}), CPU)
        inputs, targets = task.batch(0)
        loss = task.loss(task.model(fused=False)(inputs), targets).item()
        assert (loss == 0) == (noise == 0)
    half = TeacherTask(Config(**flags | {"dtype": "bfloat16"}), CPU)
    assert {p.dtype for p in half.model(fused=False).parameters()} == {torch.bfloat16}
    assert half.batch(0)[0].dtype == torch.bfloat16
    assert half.loss(*half.batch(0)).dtype == torch.float32


def test_text_targets_are_the_next_bytes_and_weights_float32(text_file):
    task = TextTask(Config(**SIZES, data=str(text_file)), CPU)
    inputs, targets = task.batch(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()) in text_file.read_bytes()
    assert {p.dtype for p in task.model(fused=False).parameters()} == {torch.float32}
    assert task.forward(task.model(fused=False), inputs).dtype == torch.bfloat16


def test_text_is_causal(text_file):
    task = TextTask(Config(**SIZES, data=str(text_file), dtype="float32"), CPU)
    model, (inputs, _) = task.model(fused=False), task.batch(0)
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    one, two = model(inputs), model(changed)
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5], two[:, 5])


@pytest.mark.parametrize("count", [1, 2, 3, 6, 23])
def test_validation_never_overlaps_training(count, tmp_path):
    for i in range(count):  # every file has bytes of its own; one file has them all
        content = bytes([i]) * 64 if count > 1 else bytes(range(200))
        (tmp_path / f"{i:02d}.txt").write_bytes(content)
    corpus = load_corpus(str(tmp_path), 10)
    train, held_out = set(corpus.train.tolist()), set(corpus.validation.tolist())
    assert train
    assert held_out
    assert not train & held_out
    assert len(corpus.train) + len(corpus.validation) == (64 * count if count > 1 else 200)
    assert len(corpus.train) > len(corpus.validation) or count == 2


def test_windows_stay_within_the_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\1" * 30)
    (tmp_path / "b").write_bytes(b"\2" * 9)
    task = TextTask(Config(**SIZES, data=str(tmp_path)), CPU)
    assert {int(x) for t in range(30) for x in task.batch(t)[0].unique()} == {1}
    for inputs, targets in task.validation():
        assert inputs.shape == targets.shape == (2, 8)
        assert inputs.unique().tolist() == targets.unique().tolist() == [2]


def test_the_hash_changes_with_a_byte_a_name_a_border(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 50)
    (tmp_path / "b").write_bytes(b"y" * 50)
    seen = [load_corpus(str(tmp_path), 2).sha256]
    assert load_corpus(str(tmp_path), 2).sha256 == seen[0]
    (tmp_path / "b").write_bytes(b"y" * 49 + b"z")
    seen.append(load_corpus(str(tmp_path), 2).sha256)
    (tmp_path / "b").rename(tmp_path / "c")
    seen.append(load_corpus(str(tmp_path), 2).sha256)
    (tmp_path / "a").write_bytes(b"x" * 50 + b"y")
    (tmp_path / "c").write_bytes(b"y" * 48 + b"z")
    seen.append(load_corpus(str(tmp_path), 2).sha256)
    assert len(set(seen)) == 4
