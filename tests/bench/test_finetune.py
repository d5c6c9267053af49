"""Task finetune: pretrained once, kept in a file that is whole or refused, one start for all."""

import dataclasses
import json

import pytest
import torch

import bench.tasks.finetune as finetune
from bench.config import Config, UserError, resolve
from bench.presets import FINETUNE, SMALL
from bench.run import main
from bench.tasks.corpus import Corpus

CPU = torch.device("cpu")
STEPS = ["--task", "finetune", "--preset", "seed", "--dtype", "float32", "--pretrain-steps", "3"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blocksched"


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """A small corpus in place of Python's sources, which take a second to read and hash."""
    text = torch.tensor(list(b"def sources(): return 1\n" * 60), dtype=torch.uint8)
    corpus = Corpus("sources", "0" * 64, text[:1000], text[1000:])
    monkeypatch.setattr(finetune, "python_sources", lambda _least: corpus)


@pytest.fixture
def config(text_file) -> Config:
    return Config(
        task="finetune", data=str(text_file), dmodel=16, n_layers=2, seq_len=16, batch_size=2,
        dtype="float32", val_batches=1, pretrain_steps=3, pretrain_lr=1e-2,
        pretrain_batch_size=2,
    )  # fmt: skip


def weights(config) -> dict[str, torch.Tensor]:
    return finetune.FinetuneTask(config, CPU).model(fused=False).state_dict()


def same(one, two) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_the_start_is_what_pretraining_made_and_the_second_time_read(config, cache, capsys):
    made = weights(config)
    assert "Pretraining, once: 3 full steps" in capsys.readouterr().out
    (path,) = cache.iterdir()
    before = path.stat().st_mtime_ns
    assert same(made, weights(config))
    said = capsys.readouterr().out
    assert "Pretraining" not in said
    assert str(path) in said
    assert path.stat().st_mtime_ns == before
    raw = finetune.TextTask(config, CPU).model(fused=False).state_dict()
    assert not any(torch.equal(raw[name], made[name]) for name in made)


def test_pretraining_is_full_steps_on_the_sources(config):
    """The same by hand: its own seed, learning rate to 0, torch's AdamW."""
    recipe = dataclasses.replace(config, seed=0)
    task = finetune.TextTask(recipe, CPU, finetune.python_sources(17))
    model = task.model(fused=False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        inputs, targets = task.batch(step)
        task.loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = dataclasses.replace(config, seed=7, weight_decay=0.9, lr=0.5, steps=1)
    assert same(model.state_dict(), weights(asked))


def test_a_seed_changes_the_batches_not_the_start(config, cache):
    other = dataclasses.replace(config, seed=7, lr=0.5, weight_decay=0.1, steps=3, batch_size=3)
    assert same(weights(config), weights(other))
    assert len(list(cache.iterdir())) == 1
    one, two = (finetune.FinetuneTask(c, CPU).batch(0)[0] for c in (config, other))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "change",
    [
        {"dmodel": 32}, {"n_layers": 3}, {"n_heads": 2}, {"hidden_mult": 2}, {"seq_len": 8},
        {"dtype": "bfloat16"}, {"pretrain_steps": 2}, {"pretrain_lr": 2e-2},
        {"pretrain_batch_size": 3},
    ],
)  # fmt: skip
def test_whatever_decides_the_weights_names_the_file(change, config, cache):
    weights(config)
    weights(dataclasses.replace(config, **change))
    assert len(list(cache.iterdir())) == 2


def test_another_corpus_or_torch_is_another_file(config, cache, monkeypatch):
    weights(config)
    corpus = finetune.python_sources(17)
    other = dataclasses.replace(corpus, sha256="1" * 64)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "python_sources", lambda _least: other)
        weights(config)
    monkeypatch.setattr(torch, "__version__", "9.9")
    weights(config)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_an_error_that_names_it(damage, config, cache):
    weights(config)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut": -1, "flipped": None, "emptied": 0}[damage]])
    with pytest.raises(UserError, match=r"pretrained-\w+\.pt is damaged: delete it"):
        weights(config)
    path.unlink()
    weights(config)


def test_an_interrupted_write_leaves_nothing(config, cache, monkeypatch):
    def stop(_descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            weights(config)
    assert list(cache.iterdir()) == []


def test_diverged_pretraining_is_not_kept(config, cache, monkeypatch):
    lost = finetune.TextTask.loss
    monkeypatch.setattr(finetune.TextTask, "loss", lambda *given: lost(*given) * torch.inf)
    with pytest.raises(UserError, match="lower --pretrain-lr"):
        weights(config)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_known_before_the_work(config, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        weights(config)
    assert "Pretraining" not in capsys.readouterr().out


def test_without_the_bible_it_needs_a_text(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match="--data"):
        finetune.FinetuneTask(dataclasses.replace(config, data=""), CPU)


def test_a_run_says_what_was_pretrained(tiny, tmp_path, cache):
    out = tmp_path / "r.json"
    names = ["full_update", "static_suffix", "dynamic_suffix"]
    argv = [*tiny, *STEPS, "--schedules", ",".join(names), "--json-out", str(out)]
    assert main(argv) == 0
    result = json.loads(out.read_text())
    facts = result["task"]["pretrained"]
    (path,) = cache.iterdir()
    assert facts["sha256"] == path.read_bytes()[:32].hex()
    assert (facts["corpus"], facts["steps"], facts["lr"]) == ("sources", 3, 3e-4)
    assert facts["val_loss"] < facts["val_loss_start"]
    assert list(result["traces"]) == names
    starts = {trace["val_trace"][0]["val_loss"] for trace in result["traces"].values()}
    assert len(starts) == 1
    assert [row["steps_executed"] for row in result["results"]] == [12] * 3  # pretraining is apart


def test_stopped_while_pretraining(tiny, tmp_path, cache, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "_pretrain", stop)
    out = tmp_path / "r.json"
    assert main([*tiny, *STEPS, "--json-out", str(out)]) == 130
    assert json.loads(out.read_text())["status"] == "interrupted"
    assert list(cache.iterdir()) == []


def test_preset_small_is_shorter_for_fine_tuning():
    config = resolve({"task": "finetune", "device": "cpu"})
    for name, value in (SMALL | FINETUNE).items():
        assert getattr(config, name) == value, name
    assert config.lr_decay == "linear"
    assert resolve({"task": "finetune", "device": "cpu", "steps": 7}).steps == 7
    assert resolve({"task": "text", "device": "cpu"}).steps == SMALL["steps"]
    assert resolve({"task": "finetune", "device": "cpu", "preset": "seed"}).steps == Config().steps
