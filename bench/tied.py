"""A suffix step of GPT-2 with tied embeddings over the untied one: `python bench/tied.py [ROUNDS]`.

A tied weight trains with the head while the embeddings are frozen. If the gradient of the input of
block 0 leaked into that weight, the whole prefix would run backward again: the graphs are counted
first, then both models take their steps in turn. Needs transformers.
"""

import collections
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blocksched import AdamW, BlockScheduler, FullUpdate, StaticSuffix

_BLOCKS, _ACTIVE = 8, 2
_TURNS = 4  # steps of each model in a round; the first is not timed


class Loop:
    """GPT-2 of random weights, its optimizer and one batch."""

    def __init__(self, *, tied: bool, active: int) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=4096, bos_token_id=None, eos_token_id=None, n_positions=128,
            n_embd=128, n_layer=_BLOCKS, n_head=4, tie_word_embeddings=tied, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self._model = GPT2LMHeadModel(config)
        self._optimizer = AdamW(self._model.parameters(), lr=1e-4)
        schedule = StaticSuffix(active=active) if active < _BLOCKS else FullUpdate()
        self._scheduler = BlockScheduler(
            self._model, self._optimizer, schedule, total_steps=1 << 40
        )
        self._tokens = torch.randint(4096, (4, 128))

    def nodes(self) -> collections.Counter[str]:
        """The nodes of the graph that a backward goes through, by name."""
        loss = self._loss()
        todo, seen = [loss.grad_fn], {loss.grad_fn}
        while todo:
            following = {node for node, _ in todo.pop().next_functions if node is not None}
            todo += following - seen
            seen |= following
        return collections.Counter(node.name() for node in seen)

    def step_ms(self) -> float:
        """The time of one step."""
        start = time.perf_counter()
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step(loss)
        return (time.perf_counter() - start) * 1e3

    def _loss(self) -> torch.Tensor:
        return self._model(input_ids=self._tokens, labels=self._tokens).loss


def main(rounds: int) -> None:
    """Count and measure; exit 1 if the graphs differ."""
    loops = {
        "untied": Loop(tied=False, active=_ACTIVE),
        "tied": Loop(tied=True, active=_ACTIVE),
        "tied, all blocks": Loop(tied=True, active=_BLOCKS),
    }
    counts = {name: loop.nodes() for name, loop in loops.items()}
    for name, count in counts.items():
        print(f"{name:<18} {count.total()} nodes in the graph of backward")
    if counts["tied"] != counts["untied"]:
        difference = counts["tied"] - counts["untied"] | counts["untied"] - counts["tied"]
        sys.exit(f"the graphs differ: {dict(difference)}")
    times: dict[str, list[float]] = {name: [] for name in loops}
    ratios = []
    for turn in range(rounds):
        order = list(loops) if turn % 2 else list(loops)[::-1]
        medians = {}
        for name in order:
            medians[name] = statistics.median([loops[name].step_ms() for _ in range(_TURNS)][1:])
            times[name].append(medians[name])
        ratios.append(medians["tied"] / medians["untied"])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds, medians")
    for name, measured in times.items():
        print(f"{name:<18} {statistics.median(measured):.1f} ms a step")
    spread = statistics.quantiles(ratios, n=4)
    print(
        f"tied / untied      {statistics.median(ratios):.3f} "
        f"(middle half of the rounds {spread[0]:.3f} to {spread[2]:.3f})"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
