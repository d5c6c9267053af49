"""The benchmark on two processes: the same problem, one report, every decision alike."""

import contextlib
import io
import json
import os
from unittest import mock

import pytest
import torch

from bench import processes
from bench.config import UserError
from bench.run import main
from bench.tasks.text import TextTask
from tests.bench.conftest import TINY
from tests.bench.test_faults import poisoned
from tests.distributed.pool import Pool

FROZEN = (
    "--preset seed --dtype float32 --lr 0.01 --dyn-warmup-steps 2 --dyn-probe-every 5"
    " --dyn-freeze-start-frac 0.2 --dyn-final-full-frac 0.2 --dyn-relevance-threshold 0.3"
)
ALL = "--schedules full_update,static_suffix,dynamic_suffix"


@pytest.fixture(scope="module")
def pool():
    made = Pool(2)
    yield made
    made.stop()


@pytest.fixture
def both(pool, text_file):
    """A function: flags -> exit status, stdout and stderr of both ranks."""

    def run(*flags: str, function=bench_on):
        return pool.run(function, [*TINY.split(), "--data", str(text_file), *flags])

    return run


def bench_on(rank: int, argv: list[str]) -> tuple[int, str, str]:
    """The benchmark on a rank of the pool, in the group that it has already."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.object(processes, "_join"),
        mock.patch.object(processes.distributed, "destroy_process_group"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_two_processes_train_what_one_does(both, tiny, tmp_path):
    flags = [*FROZEN.split(), *ALL.split(), "--json-out"]
    (code, said, _), (other_code, other_said, other_err) = both(*flags, str(tmp_path / "two.json"))
    assert (code, other_code) == (0, 0)
    assert (other_said, other_err) == ("", "")
    assert "2 processes over gloo, 1 rows of each batch to each." in said
    assert main([*tiny, *flags, str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["one.html", "one.json", "two.html", "two.json"]
    for name, trace in one["traces"].items():
        # Sums over rows in another order; 12 steps of AdamW carry that on.
        assert two["traces"][name]["train_losses"] == pytest.approx(trace["train_losses"], rel=1e-5)
        assert two["traces"][name]["active_layers_hist"] == trace["active_layers_hist"]
        parts = two["traces"][name]["parts_ms"]
        assert parts.keys() == trace["parts_ms"].keys()
        assert min(ms for each in parts.values() for ms in each.values()) > 0
        assert sum(ms for each in parts.values() for ms in each.values()) == pytest.approx(
            sum(two["traces"][name]["step_times_ms"][5:]) + len(trace["train_losses"]) - 5
        )
        for ours, theirs in zip(trace["val_trace"], two["traces"][name]["val_trace"], strict=True):
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert min(one["traces"]["dynamic_suffix"]["active_layers_hist"]) < 4
    assert main(["--replay", str(tmp_path / "two.json")]) == 0
    assert (one["system"]["processes"], one["system"]["process_backend"]) == (1, None)
    assert (two["system"]["processes"], two["system"]["process_backend"]) == (2, "gloo")
    check_bytes(one, two)
    assert "gradients sent" in said
    assert "on one process without communication" in said


def check_bytes(one, two):
    """What was sent is what trained: 4 bytes a number of the active blocks, stem and head."""
    width = 16
    block = 4 * (4 * width * width + 8 * width * width)  # attention, then two layers of 4 widths
    stem = head = 4 * 256 * width
    for row in two["results"]:
        trace = two["traces"][row["schedule"]]
        for sent, active in zip(trace["gradient_bytes"], trace["active_layers_hist"], strict=True):
            assert sent == active * block + head + (stem if active == 4 else 0)
        assert row["gradient_bytes_per_step"] == pytest.approx(
            sum(trace["gradient_bytes"]) / len(trace["gradient_bytes"])
        )
        assert 0 < row["agreement_bytes_per_step"] < 1000
    for row in one["results"]:
        assert row["gradient_bytes_per_step"] is None
        assert row["agreement_bytes_per_step"] is None


def test_equal_time_is_agreed(both, tmp_path):
    path = tmp_path / "r.json"
    flags = ["--interleave", "--equal-time-budget", "--json-out", str(path), "--preflight"]
    (code, said, _), _ = both(*FROZEN.split(), *ALL.split(), *flags)
    assert code == 0
    assert "Preflight" in said
    result = json.loads(path.read_text())
    for row in result["results"]:
        assert row["elapsed_ms"] >= result["config"]["time_budget_ms"]
    assert main(["--replay", str(path)]) == 0


def stopped_on(rank: int, argv: list[str]):
    """SIGTERM reaches rank 1 alone, in its ninth step."""
    seen = []
    batch = TextTask.batch

    def counted(self, step):
        seen.append(step)
        if rank == 1 and len(seen) == 10:  # Expected takes the first
            os.kill(os.getpid(), 15)
        return batch(self, step)

    with mock.patch.object(TextTask, "batch", counted):
        return bench_on(rank, argv)


def test_sigterm_on_one_rank_stops_both_after_the_same_step(both, tmp_path):
    path = tmp_path / "r.json"
    flags = [*FROZEN.split(), *ALL.split(), "--json-out", str(path)]
    kept = ["--resume", str(tmp_path / "kept"), "--checkpoint-every", "1000"]
    stopped = both(*flags, *kept, function=stopped_on)
    assert [code for code, _, _ in stopped] == [143, 143]
    result = json.loads(path.read_text())
    assert result["status"] == "interrupted"
    assert [row["steps_executed"] for row in result["results"]] == [9]
    assert [p.name for p in (tmp_path / "kept" / "part-0").iterdir()] == ["step-00000009"]
    (code, said, _), _ = both(*flags, *kept)
    assert code == 0
    assert "after the steps: full_update 9." in said
    ended = json.loads(path.read_text())
    assert both(*flags)[0][0] == 0
    for ours, wanted in zip(ended["results"], json.loads(path.read_text())["results"], strict=True):
        assert ours["weights_sha256"] == wanted["weights_sha256"] is not None


def poisoned_on(rank: int, argv: list[str]):
    """NaN on rank 1 only, in step 3."""
    with poisoned(lambda _, step: rank == 1 and step == 3):
        return bench_on(rank, argv)


def test_ranks_leave_out_the_same_step(both, tmp_path):
    path = tmp_path / "r.json"
    flags = [*FROZEN.split(), *ALL.split(), "--json-out", str(path)]
    assert [code for code, _, _ in both(*flags, function=poisoned_on)] == [0, 0]
    result = json.loads(path.read_text())
    assert [row["skipped_steps"] for row in result["results"]] == [1, 1, 1]
    for trace in result["traces"].values():
        assert [t for t, loss in enumerate(trace["train_losses"]) if loss is None] == [3]


def fails_on(rank: int, argv: list[str]):
    """Only rank 1 cannot read the text."""

    def refuse(*_):
        raise UserError("rank 1 cannot read")

    with mock.patch.object(TextTask, "__init__", refuse if rank else TextTask.__init__):
        return bench_on(rank, argv)


@pytest.mark.parametrize(
    ("flags", "function", "said"),
    [
        ("--batch-size 3", bench_on, "multiple of the 2 processes, got 3"),
        ("--steps 0", bench_on, "--steps"),
        ("--no-such-flag", bench_on, "--no-such-flag"),
        ("", fails_on, "rank 1 cannot read"),
        ("--out /proc/nowhere", bench_on, "--out"),
    ],
)
def test_errors_are_said_once(flags, function, said, both, tmp_path):
    out = [] if "--out" in flags else ["--out", str(tmp_path)]
    (code, _, err), (other_code, other_out, other_err) = both(
        *FROZEN.split(), *flags.split(), *out, function=function
    )
    assert (code, other_code) == (2, 2)
    assert said in err
    assert (other_out, other_err) == ("", "")


def test_rows_of_a_batch():
    """Every row is on one process, in order."""
    whole = torch.arange(12).view(6, 2)
    task = mock.Mock(batch=lambda _: (whole, whole), validation=lambda: [(whole, whole)] * 2)
    for world in (1, 2, 3, 6):
        parts = [
            processes.Share(task, mock.Mock(rank=rank, world=world), 6) for rank in range(world)
        ]
        assert torch.equal(torch.cat([part.batch(0)[0] for part in parts]), whole)
        assert torch.equal(torch.cat([part.validation()[1][1] for part in parts]), whole)
