"""Writers for one's own loop, read back with TensorBoard's reader and from W&B's offline file."""

import json
import struct
import sys
import threading

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

from blocksched import BlockScheduler, DynamicSuffix
from blocksched.integrations.metrics import Metrics
from blocksched.integrations.tensorboard import TensorBoardWriter
from blocksched.integrations.wandb import WandbWriter

MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.2, relevance_threshold=0.5,
)  # fmt: skip


class Clock:
    """Each step takes a millisecond more than the one before."""

    def __init__(self):
        self.elapsed_ms, self.ms = 0.0, 0.0

    def tick(self):
        self.ms += 1.0
        self.elapsed_ms += self.ms

    def pause(self): ...
    def resume(self): ...


@pytest.fixture
def loop(tiny):
    """Builds a scheduler and a function that does steps of its loop, ended by the one given."""

    def build(saved=None):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=40, clock=Clock())
        if saved is not None:
            scheduler.load_state_dict(saved)

        def steps(count, end, also=None):
            for step in range(scheduler.progress.step + 1, scheduler.progress.step + 1 + count):
                loss = model.loss(step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if also is not None:
                    also(step, loss.item())
                end(loss)

        return scheduler, steps

    return build


@pytest.fixture
def wanted(loop):
    """What Metrics says of the same loop, as (step, name, value)."""
    scheduler, steps = loop()
    metrics, found = Metrics(scheduler, every=5), set()

    def end(loss):
        for name, value in metrics.step(loss).items():
            found.add((scheduler.progress.step, name, value))

    steps(40, end)
    assert len({name for _, name, _ in found}) == 10
    return found


def scalars(folder):
    board = EventAccumulator(str(folder)).Reload()
    return [
        (event.step, name, event.value)
        for name in board.Tags()["scalars"]
        for event in board.Scalars(name)
    ]


def rounded(found):
    """In order, as float32: TensorBoard's numbers."""
    return sorted((step, name, torch.tensor(value).item()) for step, name, value in found)


def test_tensorboard_reads_what_metrics_says(loop, wanted, tmp_path):
    scheduler, steps = loop()
    with TensorBoardWriter(scheduler, tmp_path, every=5) as writer:
        steps(40, writer.step)
    assert sorted(scalars(tmp_path)) == rounded(wanted)


def test_tensorboard_draws_all_blocks_in_one_chart(loop, tmp_path):
    scheduler, steps = loop()
    with TensorBoardWriter(scheduler, tmp_path, every=5) as writer:
        steps(10, writer.step)
    board = EventAccumulator(str(tmp_path)).Reload()
    (event,) = board.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    blocks, times = layout.category[0].chart
    assert blocks.title == "relevance, a line per block"
    assert list(blocks.multiline.tag) == [r"^blocksched/relevance/\d+$"]
    assert len(times.multiline.tag) == 2


def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(loop, tmp_path):
    scheduler, steps = loop()
    with TensorBoardWriter(scheduler, tmp_path, every=5) as writer:
        steps(20, writer.step)
        saved = scheduler.state_dict()
        steps(9, writer.step)
    scheduler, steps = loop(saved)
    with TensorBoardWriter(scheduler, tmp_path, every=5) as writer:
        steps(20, writer.step)
    found = scalars(tmp_path)
    assert [step for step, name, _ in found if name == "blocksched/active"] == [*range(5, 41, 5)]
    assert len(found) == len(set(found))


def test_tensorboard_writes_beside_the_loops_own_numbers(loop, wanted, tmp_path):
    scheduler, steps = loop()
    board = SummaryWriter(tmp_path)
    writer = TensorBoardWriter(scheduler, board, every=5)
    steps(40, writer.step, also=lambda step, loss: board.add_scalar("own", loss, step))
    writer.close()
    found = scalars(tmp_path)
    assert sorted(row for row in found if row[1] != "own") == rounded(wanted)
    assert sum(name == "own" for _, name, _ in found) == 40
    assert not EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]


def test_tensorboard_keeps_what_was_written_before_an_error(loop, tmp_path):
    scheduler, steps = loop()

    def fail(step, _loss):
        if step == 8:
            raise ZeroDivisionError

    threads = threading.active_count()
    with (
        pytest.raises(ZeroDivisionError),
        TensorBoardWriter(scheduler, tmp_path, every=1) as writer,
    ):
        steps(40, writer.step, also=fail)
    assert threading.active_count() == threads  # the one that writes has ended
    active = [step for step, name, _ in scalars(tmp_path) if name == "blocksched/active"]
    assert active == [1, 2, 3, 4, 5, 6, 7]


def test_without_tensorboard_it_says_what_to_install(loop, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    scheduler, _ = loop()
    with pytest.raises(ImportError, match="not installed: pip install tensorboard"):
        TensorBoardWriter(scheduler, tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of the real W&B, offline."""
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    settings = wandb.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
    yield wandb.init(project="blocksched", settings=settings)
    wandb.teardown()


def finish(run):
    """End it; its process has the file on disk only after the teardown."""
    run.finish()
    wandb.teardown()


def records(folder):
    """The records of a .wandb file, which is LevelDB's log after 7 bytes of its own."""
    (path,) = folder.glob("wandb/offline-*/*.wandb")
    content, at, body = path.read_bytes(), 7, b""
    while at < len(content):
        if at % 32768 > 32768 - 7:  # no header fits in the rest of the block
            at += -at % 32768
        _, size, kind = struct.unpack_from("<IHB", content, at)
        body += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield wandb_internal_pb2.Record.FromString(body)
            body = b""


def history(folder):
    """The rows, without W&B's own columns."""
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            yield {name: value for name, value in row.items() if not name.startswith("_")}


def test_wandb_gets_what_metrics_says(loop, wanted, run, tmp_path):
    scheduler, steps = loop()
    writer = WandbWriter(scheduler, run, every=5)
    steps(40, writer.step)
    finish(run)
    found = set()
    for row in history(tmp_path):
        step = row.pop("blocksched/step")
        found |= {(step, name, value) for name, value in row.items()}
    assert found == wanted
    axes = [r.metric for r in records(tmp_path) if r.WhichOneof("record_type") == "metric"]
    assert [(axis.glob_name, axis.step_metric) for axis in axes] == [
        ("blocksched/*", "blocksched/step")
    ]


@pytest.mark.parametrize("numbered", [False, True])
def test_wandb_logs_beside_the_loops_own_numbers(loop, run, tmp_path, numbered):
    scheduler, steps = loop()
    writer = WandbWriter(scheduler, run, every=5)

    def own(step, loss):
        run.log({"own": loss}, step=step if numbered else None)

    steps(40, writer.step, also=own)
    finish(run)
    rows = list(history(tmp_path))
    assert sum("own" in row for row in rows) == 40
    assert sum("blocksched/active" in row for row in rows) == 8


def test_wandb_without_a_run_is_refused(loop):
    scheduler, _ = loop()
    with pytest.raises(ValueError, match=r"got None: pass what wandb\.init returns"):
        WandbWriter(scheduler, None)
