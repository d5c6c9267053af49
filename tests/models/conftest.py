"""Real architectures, tiny and built from their configs, and what freezing them by hand takes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

N_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its loss on the batch of a seed, and its parts as one reads them off its source.

    Attributes:
        blocks: name of the list of blocks.
        stem: the parameters that only feed block 0, as starts of their names.
        told: whether blocks= has to be passed.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    blocks: str
    stem: tuple[str, ...]
    told: bool = False

    def make(self) -> nn.Module:
        """The model in training, the same on every call."""
        torch.manual_seed(0)
        return self.build().train()

    def loss_at(self, model: nn.Module, step: int) -> Tensor:
        """The loss at `step`, its dropout included."""
        torch.manual_seed(step)
        return self.loss(model, torch.Generator().manual_seed(step))

    @property
    def argument(self) -> str | None:
        """What to pass as blocks=."""
        return self.blocks if self.told else None


def tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, N_TOKENS, (2, 6), generator=generator)


def text_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    ids = tokens(generator)
    return model(input_ids=ids, labels=ids).loss


def class_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    return model(input_ids=tokens(generator), labels=torch.tensor([0, 1])).loss


def image_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    images = torch.randn(2, 3, 16, 16, generator=generator)
    out = model(images)
    return nn.functional.cross_entropy(getattr(out, "logits", out), torch.tensor([0, 1]))


def plain_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    ids = tokens(generator)
    return nn.functional.cross_entropy(model(ids).transpose(1, 2), ids.roll(1, 1))


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": N_TOKENS,
    "max_position_embeddings": 16,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def hf(name: str, suffix: str, **numbers: object) -> Callable[[], nn.Module]:
    """Builds transformers' model `name` + `suffix` from its config."""

    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**numbers)
        return getattr(transformers, f"{name}{suffix}")(config)

    return build


gpt2 = hf("GPT2", "LMHeadModel", n_embd=16, n_layer=4, n_head=2, vocab_size=N_TOKENS,
          n_positions=16, **SPECIAL)  # fmt: skip
bert_classifier = hf("Bert", "ForSequenceClassification", **SIZES)


def causal(name: str, stem: tuple[str, ...], **numbers: object) -> Case:
    sizes = {**SIZES, **SPECIAL, "num_key_value_heads": 1, "head_dim": 8}
    return Case(hf(name, "ForCausalLM", **sizes, **numbers), text_loss, "model.layers", stem)


def t5(**numbers: object) -> Callable[[], nn.Module]:
    return hf("T5", "ForConditionalGeneration", d_model=16, d_kv=8, d_ff=32, num_layers=3,
              num_heads=2, vocab_size=N_TOKENS, decoder_start_token_id=0, **numbers)  # fmt: skip


def lora(build: Callable[[], nn.Module], **numbers: object) -> Callable[[], nn.Module]:
    """The model of `build` in PEFT's wrapper, its own weights frozen."""

    def wrapped() -> nn.Module:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, init_lora_weights=False, **numbers)
        return peft.get_peft_model(build(), config)

    return wrapped


def timm(module: str, name: str, **numbers: object) -> Callable[[], nn.Module]:
    """Builds the class `name` of timm.models.`module`."""

    def build() -> nn.Module:
        try:
            import timm.models
        except (ImportError, RuntimeError) as why:  # a torchvision of another build
            pytest.skip(f"timm cannot be imported: {why}")
        return getattr(getattr(timm.models, module), name)(num_classes=4, **numbers)

    return build


class SkipBlock(nn.Module):
    """A block that is also given the embedding, and its scale from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, x0: Tensor, *, scale: Tensor) -> Tensor:
        return x + scale * self.inner(x + x0).tanh()


class Skip(nn.Module):
    """Tied embedding, positions and scales held by the root, x0 given to every block."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 16))
        self.scales = nn.Parameter(torch.ones(4))
        self.embed = nn.Embedding(N_TOKENS, 16)
        self.blocks = nn.ModuleList(SkipBlock() for _ in range(4))
        self.head = nn.Linear(16, N_TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = x0 = self.embed(ids) + self.positions
        for i, block in enumerate(self.blocks):
            x = block(x, x0, scale=self.scales[i])
        return self.head(x)


class Mixed(nn.Module):
    """x0 mixed in between the blocks, with scales in a list, as small GPTs of speed runs do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_TOKENS, 16)
        self.mix = nn.ParameterList(nn.Parameter(torch.tensor([1.0, 0.1])) for _ in range(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(16, N_TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        x = x0 = self.embed(ids)
        for (a, b), block in zip(self.mix, self.blocks, strict=True):
            x = block(a * x + b * x0)
        return self.head(x)


class Encoder(nn.Module):
    """torch's own encoder between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_TOKENS, 16)
        one = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(one, 4, norm=nn.LayerNorm(16))
        self.head = nn.Linear(16, N_TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embed(ids), mask=mask, is_causal=True))


class Stage(nn.Sequential):
    """A stage as ConvNeXt and ResNet have them: lists of like modules, and batch norm."""

    def __init__(self, wide_in: int, wide: int) -> None:
        conv = [nn.Conv2d(wide, wide, 3, padding=1, groups=wide) for _ in range(3)]
        super().__init__(nn.Conv2d(wide_in, wide, 1), nn.BatchNorm2d(wide), nn.Sequential(*conv))


class Stages(nn.Sequential):
    """Stages of growing width."""

    def __init__(self) -> None:
        stages = nn.Sequential(*(Stage(a, b) for a, b in ((8, 8), (8, 12), (12, 16))))
        stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        super().__init__(stem, stages, nn.Flatten(), nn.Linear(16 * 16, 4))


CASES = {
    "gpt2": Case(gpt2, text_loss, "transformer.h", ("transformer.wpe",)),
    "llama": causal("Llama", ("model.embed_tokens",)),
    "mistral": causal("Mistral", ("model.embed_tokens",)),
    "qwen3-tied": causal("Qwen3", (), tie_word_embeddings=True),
    "mixtral": causal(
        "Mixtral", ("model.embed_tokens",), num_local_experts=4, output_router_logits=True
    ),
    "qwen3-moe": causal(
        "Qwen3Moe", ("model.embed_tokens",),
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    ),
    "gpt-neox": Case(
        hf("GPTNeoX", "ForCausalLM", **SIZES, **SPECIAL),
        text_loss, "gpt_neox.layers", ("gpt_neox.embed_in",),
    ),
    "bert": Case(
        hf("Bert", "ForMaskedLM", **SIZES), text_loss, "bert.encoder.layer",
        ("bert.embeddings.position", "bert.embeddings.token_type", "bert.embeddings.LayerNorm"),
    ),
    "bert-classifier": Case(
        bert_classifier, class_loss, "bert.encoder.layer", ("bert.embeddings",)
    ),
    "modernbert": Case(
        hf("ModernBert", "ForMaskedLM", cls_token_id=1, sep_token_id=2, **SIZES, **SPECIAL),
        text_loss, "model.layers", ("model.embeddings.norm",),
    ),
    "t5-encoder": Case(
        t5(tie_word_embeddings=False), text_loss, "encoder.block", (), told=True
    ),  # its embedding feeds the decoder too
    "t5-decoder": Case(t5(), text_loss, "decoder.block", ("encoder",), told=True),
    "vit": Case(
        hf("ViT", "ForImageClassification", hidden_size=16, intermediate_size=32,
           num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=8),
        image_loss, "vit.layers", ("vit.embeddings",),
    ),
    "lora-gpt2": Case(
        lora(gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
        text_loss, "base_model.model.transformer.h", (),
    ),
    "lora-bert": Case(
        lora(bert_classifier, target_modules=["query"], modules_to_save=["classifier"]),
        class_loss, "base_model.model.bert.encoder.layer", (),
    ),
    "timm-vit": Case(
        timm("vision_transformer", "VisionTransformer", img_size=16, patch_size=8, embed_dim=16,
             depth=4, num_heads=2),
        image_loss, "blocks", ("patch_embed",),
    ),
    "timm-convnext": Case(
        timm("convnext", "ConvNeXt", patch_size=1, depths=(1, 2, 1, 1), dims=(8, 8, 12, 16)),
        image_loss, "stages", ("stem",),
    ),
    "torch-encoder": Case(Encoder, plain_loss, "encoder.layers", ("embed",)),
    "stages": Case(Stages, image_loss, "1", ("0.",)),
    "skip": Case(Skip, plain_loss, "blocks", ()),
    "mixed": Case(Mixed, plain_loss, "blocks", ("embed",)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each of the models."""
    return CASES[request.param]


@pytest.fixture
def cases() -> dict[str, Case]:
    """The models by name."""
    return CASES
