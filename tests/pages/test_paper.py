"""Plots for a paper: they show what the file says, in files that are whole and well named."""

import itertools
import math
import re
import statistics
import sys

import pytest

import bench.pages.paper
from bench.config import UserError
from bench.pages import plots
from bench.pages.evidence import evidence, load
from bench.pages.looks import LIGHT, look
from bench.pages.paper import draw, plots_of
from tests.pages.cases import CORNERS, RECORDING, result

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import colors  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

_PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer pixels, for time."""
    monkeypatch.setitem(bench.pages.paper._STYLE, "savefig.dpi", 60)


def plotted(plot, *arguments):
    """The axes of a plot, and what its legend says."""
    figure = Figure(layout="constrained")
    plot(figure, *arguments)
    legend = [text.get_text() for shown in figure.legends for text in shown.get_texts()]
    return figure.axes[0], legend


def losses_of(*evidences):
    return plotted(plots.losses, evidences, *plots.loss_curves(evidences), "nats per byte")


def matrix(axes):
    """What a map shows: a row a block."""
    return axes.collections[0].get_array().tolist()


@pytest.mark.parametrize("name", CORNERS)
def test_every_corner_is_drawn(name, tmp_path):
    written = draw([evidence(CORNERS[name](), "made")], tmp_path / "figures")
    assert sorted(written) == sorted((tmp_path / "figures").iterdir())
    assert all(path.read_bytes().startswith(_PNG) for path in written)


def test_what_is_written_and_how_large(tmp_path, monkeypatch):
    monkeypatch.undo()
    written = draw([load(RECORDING)], tmp_path)
    names = ["loss", "steps", "dynamic-suffix-trained", "dynamic-suffix-relevance"]
    assert [path.name for path in written] == [
        f"recording-4090-staged-saliency-{name}.png" for name in names
    ]
    widths = [int.from_bytes(path.read_bytes()[16:20], "big") for path in written]
    assert widths == [1020, 1020, 2100, 2100]  # 3.4 and 7 inches of 300 dots


def test_no_plot_without_data(tmp_path):
    assert draw([evidence(CORNERS["no schedule yet"](), "made")], tmp_path) == []
    written = draw([evidence(CORNERS["all null"](), "made")], tmp_path)
    assert not any("loss" in path.name for path in written)
    content = result()
    for field in ("step_times_ms", "train_losses", "active_layers_hist"):
        content["traces"]["dynamic_suffix"][field] = []
    content["traces"]["dynamic_suffix"]["active_blocks"] = []
    names = [name for name, _, _ in plots_of([evidence(content, "made")])]
    assert names == ["made-loss", "made-steps"]


def test_losses_are_those_of_the_file():
    content = result()
    axes, legend = losses_of(evidence(content, "made"))
    for line, row in zip(axes.lines, content["results"], strict=False):
        points = content["traces"][row["schedule"]]["val_trace"]
        assert list(line.get_xdata()) == [point["elapsed_ms"] / 1e3 for point in points]
        assert list(line.get_ydata()) == [point["val_loss"] for point in points]
        its = look(row["schedule"], 0)
        assert (line.get_color(), line.get_marker()) == (LIGHT[f"c{its.color}"], its.marker)
    goal, end = axes.lines[3:]
    assert list(goal.get_ydata()) == 2 * [content["results"][0]["final_val_loss"]]
    assert list(end.get_xdata()) == 2 * [content["config"]["time_budget_ms"] / 1e3]
    names = [row["schedule"] for row in content["results"]]
    assert legend == [*names, "full_update's final loss", "equal time"]
    assert axes.get_xlabel() == "time in steps (seconds)"
    assert axes.get_ylabel() == "validation loss\nnats per byte"


def test_a_loss_that_was_not_finite_breaks_the_line():
    axes, _ = losses_of(evidence(CORNERS["nulls"](), "made"))
    assert [math.isnan(y) for y in axes.lines[2].get_ydata()] == 4 * [False] + 5 * [True]


def test_the_end_of_a_run_is_in_sight_and_its_start_does_not_flatten_it():
    axes, _ = losses_of(evidence(result(), "made"))
    low, high = axes.get_ylim()
    for line in axes.lines[:3]:
        losses = list(line.get_ydata())
        assert all(low < loss < high for loss in losses[1:])
        assert losses[0] > high


def test_training_losses_where_only_the_end_was_validated():
    axes, legend = losses_of(load(RECORDING))
    assert legend[3] == "validation loss at the end"
    finals = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[3:6]]
    rows = [run.row for run in load(RECORDING).runs]
    assert finals == [([row["elapsed_ms"] / 1e3], [row["final_val_loss"]]) for row in rows]
    assert axes.get_ylabel().startswith("training loss, averaged")


def test_several_files_share_a_plot():
    made = [evidence(result(seed=seed), f"file {seed}") for seed in (1, 2)]
    axes, legend = losses_of(*made)
    assert legend[:6] == [
        f"{run.name}, {each.name}" for each, run in itertools.product(made, made[0].runs)
    ]
    assert axes.lines[0].get_linestyle() != axes.lines[3].get_linestyle()
    names = [name for name, _, _ in plots_of([*made, load(RECORDING)])]
    assert names[:2] == ["all-loss", "all-loss-2"]  # in units of their own


def test_the_map_is_what_trained():
    made = evidence(CORNERS["holes"](), "made")
    axes, legend = plotted(plots.block_map, made, made.runs[1])
    changes = {change.step: change.blocks for change in made.runs[1].changes}
    blocks = list(itertools.accumulate(map(changes.get, range(40)), lambda a, b: b or a))
    assert matrix(axes) == [[float(block in now) for now in blocks] for block in range(6)]
    shades = axes.collections[0].get_cmap()
    assert [colors.to_hex(shades(x)) for x in (0.0, 1.0)] == [LIGHT["frozen"], LIGHT["trained"]]
    assert legend == ["trained", "frozen"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step of lisa", "block")


def test_the_map_marks_probes_freezing_and_recovery():
    made = load(RECORDING)
    run = made.runs[2]
    axes, legend = plotted(plots.block_map, made, run)
    marks = axes.collections[1].get_offsets()[:, 0].tolist()
    assert marks == [probe.step + 0.5 for probe in run.probes]
    lines = [line.get_xdata()[0] for line in axes.lines]
    assert lines == [run.freezing, *(step for step, _ in run.recovery)]
    assert legend[2:] == [
        *("probe: all blocks, measured", "freezing begins", "a stage of the recovery begins")
    ]


def test_relevance_is_shares_in_percent():
    made = evidence(result(), "made")
    axes, _ = plotted(plots.relevance, made, made.runs[2])
    columns = [list(column) for column in zip(*matrix(axes), strict=True)]
    for column, probe in zip(columns, made.runs[2].probes, strict=True):
        total = sum(probe.relevance)
        assert column == pytest.approx([100 * one / total for one in probe.relevance])


def test_relevance_that_was_not_finite_is_left_blank():
    made = evidence(CORNERS["nulls"](), "made")
    axes, _ = plotted(plots.relevance, made, made.runs[2])
    assert [[cell is None for cell in row] for row in matrix(axes)] == 6 * [
        4 * [False] + 4 * [True]
    ]


def test_step_times_are_medians_beside_the_expected():
    content = result()
    content["config"]["warmup_ignore_steps"] = 3
    content["traces"]["full_update"]["step_times_ms"][:3] = [1e6, 1e6, 1e6]
    made = evidence(content, "made")
    axes, legend = plotted(plots.steps, made)
    run = made.runs[2]
    marker = next(line for line in axes.lines if line.get_marker() == look(run.name, 2).marker)
    by_active = {k: [] for k in sorted(set(run.active))}
    for k, ms in list(zip(run.active, run.step_ms, strict=True))[3:]:
        by_active[k].append(ms)
    assert list(marker.get_ydata()) == [statistics.median(ms) for ms in by_active.values()]
    assert [round(x) for x in marker.get_xdata()] == list(by_active)
    segments = next(c for c in axes.collections if len(c.get_segments()) == 6).get_segments()
    assert [(line[:, 0].mean().round(6), line[0, 1]) for line in segments] == [
        (float(k), ms) for k, ms in made.expected_ms.items()
    ]
    assert legend[-1] == "expected of a suffix: sum of its parts"
    assert axes.get_ylim()[1] < 1e5
    assert axes.get_ylabel() == "step time (ms)"


def test_the_same_bytes_whatever_the_settings(tmp_path):
    made = [evidence(result(names=("full_update", "static_suffix")), "made")]
    first = [path.read_bytes() for path in draw(made, tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        again = [path.read_bytes() for path in draw(made, tmp_path / "b")]
        assert dict(matplotlib.rcParams) == before
    assert again == first


def test_no_window_system_is_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert draw([evidence(result(1, 1, ("full_update",)), "made")], tmp_path)


def test_names_are_no_paths_and_differ(tmp_path):
    names = ("full_update", "dynamic_suffix../../x", "dynamic_suffix /../ X", "dynamic $\\frac$")
    made = [evidence(result(names=names), name) for name in ("../" + 300 * "a ", "__", "__")]
    found = [name for name, _, _ in plots_of(made)]
    assert len({name.lower() for name in found}) == len(found) == 1 + 3 * 7
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]{0,63}", name) for name in found)
    folder = tmp_path / "deep" / "figures"
    assert draw([evidence(result(names=("full_update",)), "../../a")], folder) == [
        folder / "a-loss.png",
        folder / "a-steps.png",
    ]


def test_a_name_is_shown_as_it_is():
    made = evidence(result(names=("full_update", "_a", "$x", "\u4e2d")), "made")
    figure = Figure(layout="constrained")
    plots.losses(figure, [made], *plots.loss_curves([made]), "nats")
    figure.canvas.draw()  # letters that a font lacks, and formulas that are none, show here
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[1:4] == [" _a", "\\$x", "\\u4e2d"]


def test_what_cannot_be_written_is_said_in_a_line(tmp_path, monkeypatch):
    made = [evidence(result(), "made")]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--png .*file must be a folder that can be written"):
        draw(made, tmp_path / "file")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bench.results.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        draw(made, tmp_path / "figures")
    assert list((tmp_path / "figures").iterdir()) == []


def test_without_matplotlib_its_name_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw([evidence(result(), "made")], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
