"""The map of the blocks that trained: what is painted, what it says, that it stays small."""

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pages import cells, maps
from bench.pages.chart import NARROW, WIDE, Drawing, text
from bench.pages.columns import columns, in_words
from bench.pages.evidence import Change, Evidence, load
from bench.pages.looks import DARK, LIGHT
from tests.pages.cases import RECORDING
from tests.pages.runs import painted, run_of

STAGES = [
    {"step": 50, "freeze_trigger": {}},
    {"step": 150, "final_recovery_stage": "stage1"},
    {"step": 151, "final_recovery_stage": "<i>own</i>"},
]


def map_of(made: Evidence) -> str:
    return maps.block_map(made, made.runs[-1])


def drawings(made: Evidence, monkeypatch) -> dict[float, Drawing]:
    """The map at both widths, before it becomes a figure."""
    found = {}
    monkeypatch.setattr(
        maps, "figure", lambda *a, **_: found.update({w: a[2](w) for w in (WIDE, NARROW)})
    )
    map_of(made)
    return found


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=n, max_size=n
        )
    ),
    st.sampled_from([7, 6.25]),
)
def test_every_cell_is_painted_as_its_level(levels, columns):
    frame = cells.map_frame(WIDE, 7, len(levels), room=100)
    svg = cells.paint(frame, levels, maps.SHARES, columns=columns, ground="frozen")
    opacities = [[(0, *maps.SHARES)[level] for level in row] for row in levels]
    assert painted(svg, len(levels), columns) == opacities


def test_levels_are_shares_of_the_steps(monkeypatch):
    made = run_of(5, [{4, 3, 2, 1}, {4, 3, 2}, {4, 3}, {4, 3}] * 300)
    for drawing in drawings(made, monkeypatch).values():
        rows = painted(drawing.svg, 5, 400)  # of 3 steps each
        none, some, half, whole = 0, *maps.SHARES
        assert [row[:4] for row in rows] == [
            [none] * 4,
            [some, some, some, none],
            [half, half, some, some],
            [whole] * 4,
            [whole] * 4,
        ]


def absent_cells(svg: str, rows: int) -> set[tuple[int, int]]:
    """Block and column of the cells painted as not running."""
    cells_of = set()
    for path in re.findall(r'style="stroke:var\(--absent\)" d="([^"]*)"', svg):
        x = row = 0
        for kind, values in re.findall(r"([Mmh])([^Mmh]*)", path):
            first, *y = map(float, values.split())
            if kind == "M":
                x, row = int(first), rows - 1 - int(y[0])
            elif kind == "h":
                cells_of |= {(row, column) for column in range(x, x + int(first))}
            x = int(first) if kind == "M" else x + int(first)
    return cells_of


def test_blocks_that_did_not_run_have_their_own_colour_and_key(monkeypatch, open_page, whole):
    made = run_of(4, [{0}] * 4 + [{0, 2}] * 3, running=[(0, {0}), (4, {0, 1, 2})])
    for drawing in drawings(made, monkeypatch).values():
        absent = {(b, t) for b in (1, 2, 3) for t in range(4)} | {(3, t) for t in range(4, 7)}
        assert absent_cells(drawing.svg, 4) == absent
        assert painted(drawing.svg, 4, 7) == [[1] * 7, [0] * 7, [0] * 4 + [1] * 3, [0] * 7]
    monkeypatch.undo()
    assert "did not run" in open_page(whole(map_of(made))).inner_text(".legend")
    assert "did not run" not in open_page(whole(map_of(run_of(2, [{1}])))).inner_text(".legend")


def test_a_column_is_absent_where_a_block_did_not_run_in_most_of_its_steps(monkeypatch):
    made = run_of(2, [{0, 1}] * 1200, running=[(0, {0}), (100, {0, 1})])  # 3 steps a column
    for drawing in drawings(made, monkeypatch).values():
        assert absent_cells(drawing.svg, 2) == {(1, column) for column in range(33)}


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_trained_and_frozen_differ_in_lightness(colours):
    bright = [luminance(colours[name]) + 0.05 for name in ("frozen", "trained")]
    assert max(bright) / min(bright) > 3


def test_a_triangle_under_each_column_with_a_probe(monkeypatch):
    probes = sorted(random.Random(0).sample(range(5000), 60))
    made = run_of(3, [{2}] * 5000, probes)
    found = columns(made.runs[0], 3)
    with_probe = [i for i, column in enumerate(found) if column.probes]
    for width, drawing in drawings(made, monkeypatch).items():
        path = re.search(r'class="probes"[^>]* d="([^"]*)"', drawing.svg)[1]
        xs = [float(x) for x in re.findall(r"M([\d.]+)", path)]
        points = drawing.series[0].points
        assert xs == pytest.approx([points[i][0] for i in with_probe], abs=0.06), width


def test_hundreds_of_changes_are_a_small_figure():
    """lisa draws 2 of 8 blocks every 5 steps, cyclic takes one after the other."""
    draw = random.Random(0)
    for sets in (
        [tuple(draw.sample(range(8), 2)) for _ in range(200)],
        [(7 - i % 8,) for i in range(200)],
    ):
        figure = map_of(run_of(8, [one for one in sets for _ in range(5)]))
        assert len(figure) < 60_000


@pytest.mark.parametrize("kind", ["random", "restless", "worst", "worst of all columns"])
def test_a_long_run_stays_small(kind, monkeypatch):
    draw = random.Random(0)
    n, steps, most = 36, 100_000, 222  # columns
    unlike = [  # of two steps a column and no cell as the next
        tuple(b for b in range(n) if (step // 2 + b) % 2 or step % 2) for step in range(800)
    ]
    some = [tuple(b for b in range(n) if draw.random() < 0.5) for _ in range(most)]
    sets = {
        "random": draw.choices(some, k=steps),
        "restless": [some[step * most // steps] for step in range(steps)],
        "worst": unlike[: 2 * most],
        "worst of all columns": unlike,
    }[kind]
    made = run_of(n, [])
    made.runs[0].__dict__.update(  # past the checks of a file, which take their time
        active=[0] * len(sets), changes=[Change(step, blocks) for step, blocks in enumerate(sets)]
    )
    start = time.process_time()
    for drawing in drawings(made, monkeypatch).values():
        assert len(drawing.svg) < 60_000
        assert sum(len(point[2]) for point in drawing.series[0].points) < 60_000
    assert time.process_time() - start < 5


def told(opened) -> list[str]:
    """What the figure says by key, from its first column to its last."""
    opened.focus("figure")
    opened.keyboard.press("ArrowRight")
    return opened.evaluate("""() => {
        const figure = document.querySelector("figure"), said = figure.querySelector(".said");
        const found = [];
        while (said.textContent !== found.at(-1)) {
            found.push(said.textContent);
            figure.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        }
        return found;
    }""")


def staged(steps: int = 160) -> Evidence:
    """Sets with holes, probes, freezing and a recovery."""
    draw = random.Random(1)
    sets = [range(5) if t < 50 or t >= 151 else draw.sample(range(5), 2) for t in range(steps)]
    return run_of(5, sets, [0, 7, 60, 158], events=STAGES)


def test_the_keyboard_walks_the_columns(open_page, whole):
    made = staged()
    opened = open_page(whole(map_of(made)))
    expected = [in_words(column, 5) for column in columns(made.runs[0], 5)]
    expected[50] += "; freezing begins at step 50"
    expected[150] += "; recovery: stage 1 at step 150"
    expected[151] += "; recovery: <i>own</i> at step 151"
    assert told(opened) == expected
    assert opened.query_selector("i") is None


@pytest.mark.parametrize("width", [390, 1280])
def test_hover_says_the_column_under_the_mouse(width, open_page, whole):
    made = load(RECORDING)
    opened = open_page(whole(map_of(made)), width=width)
    said = [in_words(column, 18) for column in columns(made.runs[-1], 18)]
    svg = next(one for one in opened.query_selector_all(".plot > svg") if one.is_visible())
    box = svg.bounding_box()
    scale = box["width"] / (WIDE if width == 1280 else NARROW)
    left, right = box["x"] + 52 * scale, box["x"] + box["width"] - 16 * scale
    for i in (0, 1, 90, 150, 301):
        x = left + (right - left) * (4 * i + 2) / 1206
        for y in (0.4, 0.7):
            opened.mouse.move(x, box["y"] + box["height"] * y)
            shown = opened.inner_text(".tip")
            assert shown.startswith(said[i]), (i, y)


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_stay_inside_and_apart(width, open_page, whole):
    for made in (staged(), load(RECORDING)):
        opened = open_page(whole(map_of(made)), width=width)
        boxes = opened.evaluate("""() => [...document.querySelectorAll(".plot > svg")]
            .find(svg => svg.clientWidth).querySelectorAll(":scope text").values()
            .map(one => [one.textContent, one.getBBox()])
            .map(([words, {x, y, width, height}]) => [words, x, y, x + width, y + height])
            .toArray()""")
        assert len(boxes) > 8
        kind = "wide" if width == 1280 else "narrow"
        lines = opened.get_attribute(f".{kind} [stroke-dasharray]", "d")
        rules = [map(float, line.split("V")[0].split()) for line in lines.split("M")[1:]]
        through = [
            one
            for x, begin in rules
            for one, left, _, right, bottom in boxes
            if ", step " in one and left < x < right and begin < bottom - 4
        ]
        assert through == []
        moved = opened.get_attribute(f".{kind} g[transform]", "transform")
        above = float(re.search(r",([\d.]+)\)", moved)[1])
        assert all(box[4] <= above for box in boxes if ", step " in box[0])
        for i, (one, left, top, right, bottom) in enumerate(boxes):
            assert left >= 0, one
            assert right <= (WIDE if width == 1280 else NARROW), one
            for other, x, y, x_end, y_end in boxes[:i]:
                apart = right <= x or x_end <= left or bottom <= y + 1 or y_end <= top + 1
                assert apart, (one, other)


@pytest.mark.parametrize(
    ("made", "words", "note"),
    [
        (run_of(4, [range(4)]), "step 0: 4 of 4 blocks train (0-3)", "No block was ever frozen."),
        (run_of(1, [{0}] * 2), "step 0: 1 of 1 blocks train (0)", "No block was ever frozen."),
        (run_of(2, [{1}, ()]), "step 0: 1 of 2 blocks train (1)", "A column stands for one step."),
        (run_of(2, [{1}] * 999), "steps 0-2: 1 of 2 blocks train (1)", "stands for 3 steps."),
    ],
)
def test_corners(made, words, note, open_page, whole):
    figure = map_of(made)
    assert not re.search("NaN|nan|inf|None", figure.partition("<script")[0])
    opened = open_page(whole(figure), width=390, dark=True)
    assert told(opened)[0] == words
    assert note in opened.inner_text(".note")


def test_no_trace_no_map():
    assert map_of(run_of(3, [])) == ""


def test_names_are_escaped_and_ids_their_own():
    evil = "</script><b id='x'>"
    figure = map_of(run_of(2, [{1}], name=evil))
    assert "<b" not in figure
    assert text(evil) in figure
    assert cells.slug("a", "b_c") != cells.slug("a", "b-c") != cells.slug("a-b", "c")
    assert re.fullmatch(r"[\w-]+", cells.slug("a b", evil))
