"""Of several ranks the first one writes."""

from pathlib import Path

from blocksched.integrations.metrics import Metrics
from blocksched.integrations.tensorboard import TensorBoardWriter
from blocksched.integrations.wandb import WandbWriter
from tests.distributed.hand_loop import DYNAMIC, build, reduce


class Rows:
    """Stands in for a wandb.Run."""

    def __init__(self):
        self.rows = []

    def define_metric(self, name, *, step_metric): ...

    def log(self, data):
        self.rows.append(data)


def steps(rank, build_writer):
    """Ten steps ended by a writer; what it gave, and the steps taken."""
    model, optimizer, scheduler = build(DYNAMIC)
    writer, given = build_writer(scheduler), []
    for step in range(10):
        loss = model.loss(2 * step + rank)
        loss.backward()
        reduce(model)
        optimizer.step()
        optimizer.zero_grad()
        given.append(writer.step(loss))
    scheduler.close()
    return given, scheduler.progress.step


def with_metrics(rank):
    return steps(rank, lambda scheduler: Metrics(scheduler, every=2))


def with_tensorboard(rank, folder):
    def build_writer(scheduler):
        return TensorBoardWriter(scheduler, Path(folder) / str(rank))

    return steps(rank, build_writer)[1]


def with_wandb(rank):
    run = Rows() if rank == 0 else None
    return steps(rank, lambda scheduler: WandbWriter(scheduler, run, every=2))[1], run and run.rows


def test_lines_are_the_first_ranks(ranks):
    (first, taken), (second, also_taken) = ranks(with_metrics)
    assert sum("blocksched/active" in line for line in first) == 5
    assert second == [{}] * 10
    assert (taken, also_taken) == (10, 10)


def test_tensorboard_is_written_by_the_first(ranks, tmp_path):
    assert ranks(with_tensorboard, str(tmp_path)) == [10, 10]
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]


def test_wandb_is_given_rows_by_the_first(ranks):
    (taken, rows), (also_taken, none) = ranks(with_wandb)
    assert (taken, also_taken) == (10, 10)
    assert [row["blocksched/step"] for row in rows if "blocksched/active" in row] == [
        2,
        4,
        6,
        8,
        10,
    ]
    assert none is None
