"""A cost model of a step on many GPUs, by how many blocks train: computing, network, memory.

Nothing here was measured on a GPU: a step is counted in floating-point operations and bytes, and
divided by the constants below. bench/scale.py prints what follows from it.
"""

import math
from typing import NamedTuple


class Constant(NamedTuple):
    """A number that the model takes from elsewhere."""

    what: str
    value: float
    source: str


PEAK = Constant("H100 SXM, bfloat16, dense, operations a second", 989e12, "NVIDIA's data sheet")
REACHED = Constant(
    "share of it that training reaches", 0.4, "0.38 to 0.43, Llama 3 (arXiv:2407.21783)"
)
HBM = Constant("memory, bytes a second", 3.35e12, "NVIDIA's data sheet")
NVLINK = Constant("NVLink in a node of 8, bytes a second, each way", 450e9, "NVIDIA's data sheet")
NODE = Constant(
    "between nodes, bytes a second a node", 8 * 50e9, "400 Gb/s a GPU, Llama 3 (arXiv:2407.21783)"
)
LINK_REACHED = Constant("share of a link that NCCL reaches", 0.8, "assumed; not measured here")
HOP = Constant(
    "one step of a collective on the host, seconds",
    30e-6,
    "one way through the kernel's TCP takes 10 to 30 us (kentino.com, Latency Dissection)",
)
TAKE = Constant("a rank takes one small message, seconds", 3e-6, "assumed; not measured here")
KEPT = Constant(
    "kept for backward, bytes a token, block and unit of width",
    34,
    "arXiv:2205.05198, attention matrices not kept",
)
UPDATE = Constant("AdamW, float32, bytes moved a parameter", 28, "docs/lab.md")
CONSTANTS = (PEAK, REACHED, HBM, NVLINK, NODE, LINK_REACHED, HOP, TAKE, KEPT, UPDATE)

GRADIENT = 4  # bytes: float32 gradients of float32 weights, reduced as they are
GATHERED = 2  # bytes: FSDP2 gathers weights in bfloat16
MOMENTS = 8  # bytes: two float32 moments
SEQUENCE = 8192  # tokens


class Shape(NamedTuple):
    """A transformer: `kv` is the width of keys and of values, `mlp` the matrices of an MLP."""

    name: str
    blocks: int
    width: int
    hidden: int
    kv: int
    vocabulary: int
    mlp: int = 3

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return (2 * self.width + 2 * self.kv + self.mlp * self.hidden) * self.width

    @property
    def embedding(self) -> int:
        """Parameters of the stem, and of the head."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.blocks * self.block + 2 * self.embedding


# Llama 3.2 1B (its config.json; untied here), Llama 3 8B and 70B (arXiv:2407.21783, table 3).
SHAPES = (
    Shape("1B", 16, 2048, 8192, 512, 128_256),
    Shape("8B", 32, 4096, 14_336, 1024, 128_256),
    Shape("70B", 80, 8192, 28_672, 1024, 128_256),
)
CPU = Shape("preset small", 8, 128, 512, 128, 256, mlp=2)


class Work(NamedTuple):
    """Operations a token: of a block forward and backward, of the head; `saved` in a suffix,
    whose first block needs no gradient for what its queries, keys and values are made from."""

    forward: float
    backward: float
    head: float
    saved: float


def work(shape: Shape, sequence: int, checkpointing: bool = False) -> Work:
    """Twice the parameters and half of the attention matrix, forward; backward twice that, and
    with activation checkpointing the forward again."""
    forward = 2 * shape.block + 2 * sequence * shape.width
    saved = 2 * shape.width * (shape.width + 2 * shape.kv)
    return Work(forward, (3 if checkpointing else 2) * forward, 6 * shape.embedding, saved)


def operations(shape: Shape, k: int, sequence: int, checkpointing: bool = False) -> float:
    """Operations a token of a step in which the top `k` blocks train."""
    w = work(shape, sequence, checkpointing)
    saved = w.saved if k < shape.blocks else 0.0
    return shape.blocks * w.forward + k * w.backward + w.head - saved


def bandwidth(gpus: int) -> float:
    """What a ring moves, bytes a second: NVLink in a node; between nodes all its links together."""
    return (NVLINK if gpus <= 8 else NODE).value * LINK_REACHED.value


def ring(size: float, gpus: int) -> float:
    """Seconds of an all-gather or a reduce-scatter; an all-reduce is one of each."""
    return (gpus - 1) / gpus * size / bandwidth(gpus)


def update(parameters: float) -> float:
    """Seconds of an update, at the memory's speed."""
    return UPDATE.value * parameters / HBM.value


class Times(NamedTuple):
    """Seconds of a step, and how much of them computing waits for the network."""

    step: float
    waits: float


def ddp(shape: Shape, k: int, gpus: int, tokens: int) -> Times:
    """All-reduces follow one another, each as soon as backward has made its gradients."""
    w, second = work(shape, SEQUENCE), tokens / (PEAK.value * REACHED.value)
    full = k == shape.blocks
    now = (shape.blocks * w.forward + w.head) * second
    network = now + 2 * ring(GRADIENT * shape.embedding, gpus)
    for left in range(k, 0, -1):
        now += (w.backward - (w.saved if left == 1 and not full else 0.0)) * second
        network = max(network, now) + 2 * ring(GRADIENT * shape.block, gpus)
    if full:
        network += 2 * ring(GRADIENT * shape.embedding, gpus)
    end = max(now, network) + update(trained(shape, k))
    return Times(end, max(0.0, network - now))


def fsdp(shape: Shape, k: int, gpus: int, tokens: int) -> Times:
    """Each block is gathered for forward, and the active ones again for backward, whose gradients
    are scattered; either goes on beside the computing of one block."""
    w, second = work(shape, SEQUENCE), tokens / (PEAK.value * REACHED.value)
    full = k == shape.blocks
    gather, scatter = ring(GATHERED * shape.block, gpus), ring(GRADIENT * shape.block, gpus)
    ends = (3 * GATHERED + (2 if full else 1) * GRADIENT) * shape.embedding
    computing = operations(shape, k, SEQUENCE) * second
    waits = shape.blocks * max(0.0, gather - w.forward * second)
    waits += k * max(0.0, gather + scatter - w.backward * second)
    waits += max(0.0, ring(ends, gpus) - w.head * second)
    return Times(computing + waits + update(trained(shape, k) / gpus), waits)


def trained(shape: Shape, k: int) -> int:
    """Parameters that train in a step: the head always, the stem with block 0."""
    return k * shape.block + (2 if k == shape.blocks else 1) * shape.embedding


def ring_vote(gpus: int) -> float:
    """Seconds of gloo's all-gather of a few bytes: a ring of P - 1 steps, each waiting."""
    return (gpus - 1) * HOP.value


def root_vote(gpus: int) -> float:
    """Seconds of gloo's gather, all to one rank at once, and of its broadcast along a tree."""
    return (1 + math.ceil(math.log2(gpus))) * HOP.value + (gpus - 1) * TAKE.value


def mixed(full: float, suffix: float) -> float:
    """The mean step of a run: all blocks train in its first and last tenth and on each 20th step
    between."""
    share = 0.2 + 0.8 / 20
    return share * full + (1 - share) * suffix


def memory(shape: Shape, k: int, gpus: int, how: str) -> tuple[float, float, float]:
    """Bytes a GPU: weights and moments, gradients, and what a sequence keeps for backward."""
    shards = gpus if how == "FSDP2" else 1
    stays = (4 + MOMENTS) * shape.parameters / shards
    kept = KEPT.value * SEQUENCE * shape.width * k
    return stays, GRADIENT * trained(shape, k) / shards, kept
