"""attach with the options of Trainer that touch what trains, and what is refused."""

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from blocksched import DynamicSuffix, FullUpdate, StaticSuffix, find_blocks
from blocksched.integrations.transformers import attach

# peft asks transformers under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
MOVING = DynamicSuffix(
    min_active=1, max_active=2, warmup_steps=1, probe_every=4, refresh_every=0,
    freeze_start_frac=0.1, relevance_threshold=0.5,
)  # fmt: skip


class Moves(TrainerCallback):
    """Notes for each step which blocks an update moved."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, _args, _state, _control, model, **_):
        self.before = blocks(model)

    def on_optimizer_step(self, _args, _state, _control, model, **_):
        pairs = zip(self.before, blocks(model), strict=True)
        self.steps.append([i for i, (old, new) in enumerate(pairs) if not equal(old, new)])


def blocks(model):
    return [weights(block) for block in find_blocks(model).modules]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def trained(trainer, schedule=MOVING, **arguments):
    each = trainer(**arguments)
    each.add_callback(moves := Moves())
    attach(each, schedule)
    each.train()
    return each, moves.steps


def lora(gpt2):
    config = peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "neftune_noise_alpha": 1.0},
        {"activation_checkpointing": True},
        {"model": lora, "activation_checkpointing": True},
    ],
)
def test_exactly_the_active_blocks_move(trainer, gpt2, arguments):
    if "model" in arguments:
        arguments = {**arguments, "model": arguments["model"](gpt2)}
    each, moved = trained(trainer, **arguments)
    active = [line["blocksched/active"] for line in each.state.log_history if "loss" in line]
    assert [len(step) for step in moved] == active
    assert all(step == list(range(4 - len(step), 4)) for step in moved)
    assert [len(step) for step in moved[::4]] == [4, 4, 4]
    assert len(moved[2]) < 4


def test_activation_checkpointing_gives_the_same_weights(trainer):
    plain, _ = trained(trainer)
    checkpointed, _ = trained(trainer, activation_checkpointing=True)
    assert equal(weights(plain.model), weights(checkpointed.model))


def test_weights_that_peft_froze_stay_frozen_for_good(trainer, gpt2):
    model = lora(gpt2)
    before = weights(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trained(trainer, model=model)
    after = weights(model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if "lora" in name}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [None, lora])
def test_the_best_model_is_loaded_and_saved_as_without_a_schedule(trainer, gpt2, tmp_path, build):
    most = build is not None  # the loss rises here and falls there: the best is not the last
    each = trainer(
        model=None if build is None else build(gpt2), load_best_model_at_end=True,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        greater_is_better=most,
    )  # fmt: skip
    attach(each, MOVING)
    each.train()
    lines = [line for line in each.state.log_history if "eval_loss" in line]
    best = (max if most else min)(lines, key=lambda line: line["eval_loss"])
    assert best["step"] < 12
    assert each.evaluate()["eval_loss"] == best["eval_loss"]
    each.save_model(str(tmp_path / "saved"))
    assert list((tmp_path / "saved").glob("*model.safetensors"))


def test_a_second_train_starts_over_with_everything_trainable(trainer):
    each, moved = trained(trainer, StaticSuffix(active=1))
    hooks = [m._forward_pre_hooks or m._forward_hooks for m in each.model.modules()]
    assert not any(hooks)
    assert all(p.requires_grad for p in each.model.parameters())
    each.train()
    assert moved == [[3]] * 24


def test_training_that_fails_leaves_the_model_as_it_was_found(trainer):
    class Fails(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyError("data")
            return super().training_step(*args, **kwargs)

    each = trainer(kind=Fails, logging_steps=2)
    attach(each, StaticSuffix(active=1))
    with pytest.raises(KeyError):
        each.train()
    each.log({"loss": 1.0})
    assert list(each.state.log_history[-1]) == ["loss", "epoch", "step"]
    assert all(p.requires_grad for p in each.model.parameters())
    assert not any(m._forward_pre_hooks for m in each.model.modules())


def test_a_smaller_batch_after_running_out_of_memory_begins_again(trainer):
    class Full(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and self._train_batch_size == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    each, moved = trained(
        trainer, StaticSuffix(active=1), kind=Full, auto_find_batch_size=True, max_steps=4
    )
    assert moved == [[3]] * 6
    assert all(p.requires_grad for p in each.model.parameters())


def test_model_init_builds_a_new_model_for_each_train(trainer, gpt2):
    each = trainer(init={"model_init": lambda: gpt2(3)}, model=None)
    attach(each, StaticSuffix(active=1))
    first = each.model
    each.train()
    assert each.model is not first
    assert equal(weights(gpt2(3).transformer.h[:2]), weights(each.model.transformer.h[:2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_compile": True}, "compile_blocks"),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            '"use_reentrant": False',
        ),
    ],
)
def test_arguments_that_are_refused(trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(trainer(**arguments), FullUpdate())


def test_several_devices_in_a_process_are_refused(trainer, monkeypatch):
    each = trainer()
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"one process drives 2 devices.*torchrun"):
        attach(each, FullUpdate())


def test_several_processes_without_ddp_are_refused(trainer, monkeypatch):
    class Sharded(Trainer):
        def _prepare_for_training(self, *args):
            prepared = super()._prepare_for_training(*args)
            monkeypatch.setattr(TrainingArguments, "world_size", 2)
            return prepared

    each = trainer(kind=Sharded)
    attach(each, FullUpdate())
    with pytest.raises(ValueError, match="2 processes share the model without Distributed"):
        each.train()


def test_a_wrapped_model_is_refused(trainer):
    class Compiles(Trainer):
        def _prepare_for_training(self, *args):
            model, loader = super()._prepare_for_training(*args)
            self.model_wrapped = torch.compile(model, backend="eager")
            return self.model_wrapped, loader

    each = trainer(kind=Compiles)
    attach(each, FullUpdate())
    with pytest.raises(ValueError, match="wrapped in a OptimizedModule"):
        each.train()


def test_a_second_schedule_is_refused(trainer):
    each = trainer()
    attach(each, FullUpdate())
    with pytest.raises(ValueError, match="has a schedule already"):
        attach(each, FullUpdate())


def test_blocks_and_stem_are_handed_on(trainer):
    each = trainer(max_steps=2)
    each.add_callback(moves := Moves())
    attach(each, StaticSuffix(active=2), blocks=list(each.model.transformer.h)[2:])
    each.train()
    assert moves.steps == [[0, 1, 2, 3]] * 2  # the lower two are the stem, which trains with these
    for argument in ({"blocks": "transformer.no"}, {"stem": ["transformer.no"]}):
        each = trainer()
        attach(each, FullUpdate(), **argument)
        with pytest.raises(ValueError, match=r"names 'transformer\.no'"):
            each.train()
