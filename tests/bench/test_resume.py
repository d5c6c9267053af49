"""--resume: a run that is stopped anywhere and started again ends as if it had never stopped."""

import json
import random

import pytest

import bench.runner
from bench.results import parse, write
from bench.run import main

NAMES = ["--schedules", "full_update,dynamic_suffix"]
MOVING = (
    "--preset seed --dtype float32 --lr 0.01 --dyn-warmup-steps 2 --dyn-probe-every 5"
    " --dyn-refresh-every 0 --dyn-freeze-start-frac 0.2 --dyn-require-stable"
    " --dyn-stability-window 2 --dyn-stability-rel-change 0.5 --dyn-stability-cv 0.5"
    " --dyn-relevance-threshold 0.3"
    " --dyn-final-full-frac 0.3 --dyn-final-recovery-mode staged"
    " --dyn-final-recovery-stage1-layers 2 --dyn-final-recovery-stage2-layers 3"
)
SAME = (
    *("train_losses", "active_layers_hist", "active_blocks", "probe_steps", "dynamic_trace"),
    *("gradient_bytes", "memory"),
)


class Stopper:
    """Stands in for the live lines: stops the run at the given update."""

    def __init__(self, at: int) -> None:
        self.left = at

    def update(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def run(tiny, path, *flags: str):
    """The exit status and what the result file holds."""
    argv = [*tiny, *NAMES, *MOVING.split(), "--steps", "30", *flags]
    code = main([*argv, "--json-out", str(path)])
    return code, json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """What a run that nothing stopped has learned."""
    code, result = run(tiny, tmp_path_factory.mktemp("whole") / "r.json")
    assert code == 0
    return learned(result)


@pytest.fixture
def go(tiny, tmp_path):
    """A function: flags -> exit status and what the result file holds."""
    return lambda *flags, out="r.json": run(tiny, tmp_path / out, *flags)


def learned(result) -> dict:
    """All of a result that does not depend on how fast the machine was."""
    weights = {row["schedule"]: row["weights_sha256"] for row in result["results"]}
    assert all(weights.values())
    traces = {
        name: {key: trace[key] for key in SAME}
        | {"val": [(v["step"], v["val_loss"]) for v in trace["val_trace"]]}
        for name, trace in result["traces"].items()
    }
    return {"weights": weights, "traces": traces}


@pytest.mark.parametrize(("mode", "every"), [("--no-interleave", "1"), ("--interleave", "7")])
def test_stopped_and_started_again_and_again(mode, every, whole, go, tmp_path, monkeypatch):
    assert len({*whole["traces"]["dynamic_suffix"]["active_layers_hist"]}) == 3
    chance = random.Random(every)
    flags = mode, "--resume", str(tmp_path / "kept"), "--checkpoint-every", every
    stops, code = 0, 130
    while code == 130:
        stops += 1
        with monkeypatch.context() as patch:
            at = chance.choice([3, 4, 5])
            patch.setattr(bench.runner, "Live", lambda at=at: Stopper(at))
            code, result = go(*flags)
    assert code == 0
    assert stops > 2
    assert learned(result) == whole
    assert result["status"] == "complete"
    lengths = {len(trace["step_times_ms"]) for trace in result["traces"].values()}
    assert lengths == {30}
    for trace in result["traces"].values():
        spent = [sum(parts.values()) - parts["steps"] for parts in trace["parts_ms"].values()]
        assert sum(spent) == pytest.approx(sum(trace["step_times_ms"][5:]))
    assert main(["--replay", str(tmp_path / "r.json")]) == 0


def test_a_run_that_is_done_only_reports(go, tmp_path, monkeypatch, capsys):
    flags = "--resume", str(tmp_path / "kept")
    _, first = go(*flags)
    monkeypatch.setattr(bench.runner.Run, "_advance", lambda *_: pytest.fail("it trained"))
    capsys.readouterr()
    code, again = go(*flags, out="again.json")
    assert code == 0
    for result in (first, again):
        for different in ("timestamp_utc", "config", "sha256"):
            result.pop(different)
    assert again == first
    assert "Going on from a checkpoint, after the steps: full_update 30." in capsys.readouterr().out


def test_the_time_budget_is_kept(go, tmp_path, monkeypatch):
    flags = "--resume", str(tmp_path / "kept"), "--checkpoint-every", "5", "--equal-time-budget"
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "Live", lambda: Stopper(4))
        assert go("--interleave", *flags)[0] == 130
    kept = json.loads((tmp_path / "kept" / "run.json").read_text())["budget_ms"]
    code, result = go("--interleave", *flags)
    assert code == 0
    assert result["config"]["time_budget_ms"] == kept
    for row in result["results"]:
        assert row["weights_sha256"] is None
        assert row["elapsed_ms"] >= kept or row["steps_executed"] == 90


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--lr", "0.02"], "--lr 0.01 there, 0.02 here"),
        (["--steps", "31", "--seed", "1"], "--seed 42 there, 1 here; --steps 30 there, 31 here"),
        (["--data"], "text "),
    ],
)
def test_another_run_is_refused(changed, said, go, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "Live", lambda: Stopper(2))
        go("--resume", str(kept), "--checkpoint-every", "1")
    if changed == ["--data"]:
        other = tmp_path / "other"
        other.write_text("another text " * 99)
        changed = ["--data", str(other)]
    before = {p: p.read_bytes() for p in kept.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert go("--resume", str(kept), *changed)[0] == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert before == {p: p.read_bytes() for p in kept.rglob("*") if p.is_file()}


def test_checkpoints_of_an_older_layout_are_refused(go, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "Live", lambda: Stopper(2))
        go("--resume", str(kept), "--checkpoint-every", "1")
    run_json = parse((kept / "run.json").read_bytes())
    del run_json["layout"]
    write(kept / "run.json", run_json)
    capsys.readouterr()
    assert go("--resume", str(kept))[0] == 2
    assert "is another run's: layout None there, 4 here" in capsys.readouterr().err


def test_flags_that_change_no_step_may_differ(whole, go, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "Live", lambda: Stopper(2))
        go("--resume", str(kept), "--checkpoint-every", "1")
    moved = kept.rename(tmp_path / "moved")
    code, result = go("--resume", str(moved), "--preflight", out="other.json")
    assert code == 0
    assert learned(result) == whole


def newest(kept):
    return max(kept.glob("part-*/step-*"), key=lambda path: path.name)


def spoil(kept, kind: str) -> None:
    """Damage the newest checkpoint, or what says which run it is of."""
    if kind == "run.json":
        (kept / kind).write_text((kept / kind).read_text()[:-9])
        return
    path = newest(kept) / kind
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["model.pt", "rank-00000.pt", "manifest.json", "run.json"])
def test_damage_is_an_error_and_the_previous_one_serves(
    kind, whole, go, tmp_path, monkeypatch, capsys
):
    kept = tmp_path / "kept"
    flags = "--interleave", "--resume", str(kept)
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "Live", lambda: Stopper(5))
        go(*flags, "--checkpoint-every", "1")
    spoil(kept, kind)
    capsys.readouterr()
    assert go(*flags)[0] == 2
    error = capsys.readouterr().err
    assert kind in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert ("--allow-previous" in error) == (kind != "run.json")
    if kind != "model.pt":
        return
    code, result = go(*flags, "--allow-previous")
    assert code == 0
    assert learned(result) == whole
    assert "warning: " in capsys.readouterr().err


def test_where_no_folder_can_be(go, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert go("--resume", str(tmp_path / "file"))[0] == 2
    assert "--resume" in capsys.readouterr().err
    assert go("--allow-previous")[0] == 2
    assert "add --resume" in capsys.readouterr().err
