"""Step times, their parts and the memory: what is drawn and said is what the file holds."""

import collections
import json
import re

import pytest

from bench.pages import steps
from bench.pages.evidence import evidence
from tests.pages.cases import CORNERS, PARTS, result

FIGURES = {"step-times": steps.step_times, "step-parts": steps.parts, "memory": steps.memory}
MIB = 2**20
OUTSIDE = """() => [...document.querySelectorAll(".plot > svg")].flatMap(svg => {
  const outer = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("path, text")].filter(one => {
    const box = one.getBoundingClientRect();
    return !one.closest("defs") && box.width
      && (box.left < outer.left - 1 || box.right > outer.right + 1);
  }).map(one => one.outerHTML);
})"""


def body(made) -> str:
    found = evidence(made, "it")
    return "".join(make(found) for make in FIGURES.values())


@pytest.fixture
def opened(open_page, whole):
    return lambda made, **options: open_page(whole(body(made)), **options)


def said(page, name: str) -> list[str]:
    """All that a figure says, by keys: along each series, then on to the next."""
    page.focus(f"#{name}")
    counts = [len(s["texts"]) for s in values(page, name)["series"]]
    heard = []
    for i, count in enumerate(counts):
        page.keyboard.press("ArrowDown" if i else "ArrowRight")
        page.keyboard.press("Home")
        for point in range(count):
            if point:
                page.keyboard.press("ArrowRight")
            heard.append(page.inner_text(f"#{name} .said"))
    return heard


def values(page, name: str) -> dict:
    return json.loads(page.text_content(f"#{name} > script"))


def hovered(page, name: str, element) -> str:
    """The tip over the middle of what is drawn."""
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    return page.inner_text(f"#{name} .tip")


def times_by_blocks(made, name: str) -> dict[int, list[float]]:
    """As counted by hand, in order."""
    warming, trace = made["config"]["warmup_ignore_steps"], made["traces"][name]
    by_blocks = collections.defaultdict(list)
    for step, (k, ms) in enumerate(
        zip(trace["active_layers_hist"], trace["step_times_ms"], strict=True)
    ):
        if step >= warming and ms is not None:
            by_blocks[k].append(ms)
    return {k: sorted(by_blocks[k]) for k in sorted(by_blocks)}


@pytest.mark.parametrize("width", [390, 1280])
def test_step_times_are_the_files(width, opened):
    made = result(steps=203)
    made["config"]["warmup_ignore_steps"] = 3
    slow = made["traces"]["full_update"]["step_times_ms"]
    slow[:3] = [999.0] * 3  # warming up
    slow[7] = slow[9] = None
    for row in made["results"]:
        active = made["traces"][row["schedule"]]["active_layers_hist"][3:]
        row["expected_step_ms"] = 2.0 + sum(active) / len(active)
    wanted = []
    for name in made["traces"]:
        for k, ms in times_by_blocks(made, name).items():
            low, median, high = (ms[round(q * (len(ms) - 1))] for q in (0.1, 0.5, 0.9))
            wanted.append(
                f"{name}, {k} blocks train: {len(ms)} steps, median {median:.3g} ms, "
                f"10-90 %: {low:.3g}-{high:.3g} ms; expected {2 + k:.3g} ms"
            )
    page = opened(made, width=width)
    assert said(page, "step-times") == wanted
    assert len(wanted) == 4
    assert "198 steps" in wanted[0]
    assert "The first 3 steps of each schedule are left out." in page.inner_text("#step-times")
    box = page.query_selector_all("#step-times .plot > svg:visible path.mark")[0]
    assert hovered(page, "step-times", box) == wanted[0]


def test_boxes_and_dashes_stand_at_their_times(opened):
    made = result(names=("full_update",))
    made["traces"]["full_update"]["step_times_ms"] = [float(i) for i in range(40)]
    page = opened(made)

    def height(selector: str) -> float:
        box = page.query_selector(f"#step-times .wide {selector}").bounding_box()
        return box["y"] + box["height"] / 2

    ticks = page.query_selector_all("#step-times .wide .tick")
    pixels = {}
    for tick in ticks[:-1]:  # the last numbers the group of blocks
        box = tick.bounding_box()
        pixels[float(tick.text_content())] = box["y"] + box["height"] / 2
    assert {0.0, 20.0} <= pixels.keys()
    ms = (pixels[0.0] - pixels[20.0]) / 20
    assert height("path.mark") == pytest.approx(pixels[0.0] - 20 * ms, abs=2)
    assert height("path[stroke-dasharray]") == pytest.approx(pixels[0.0] - 8 * ms, abs=2)
    line, box = page.query_selector_all("#step-times .wide path.line")
    assert line.bounding_box()["height"] == pytest.approx((35 - 4) * ms, abs=2)
    assert box.bounding_box()["height"] == pytest.approx((29 - 10) * ms, abs=4)


def test_other_kernels_have_no_expected_time(opened):
    made = result()
    made["results"][0]["expected_step_ms"] = None
    heard = said(opened(made), "step-times")
    assert ["expected" in text for text in heard] == [False, True, True, True]
    for row in made["results"]:
        row["expected_step_ms"] = None
    page = opened(made)
    assert not any("expected" in text for text in said(page, "step-times"))
    assert "should take" not in page.inner_text("#step-times")


def test_steps_that_are_no_suffixes_have_no_expected_time_there(opened):
    """They take more than a suffix of as many blocks, as the row's mean says."""
    made = result(names=("full_update", "lisa"))
    assert all("expected" in text for text in said(opened(made), "step-times"))
    made["results"][1]["expected_step_ms"] += 1.0
    heard = said(opened(made), "step-times")
    assert ["expected" in text for text in heard] == [True, False]


@pytest.mark.parametrize("width", [390, 1280])
def test_parts_are_the_files(width, opened):
    made = result(freeze_at=10)
    for trace in made["traces"].values():
        for sums in trace["parts_ms"].values():
            for i, part in enumerate(PARTS):
                sums[part] *= 1 + i
    page = opened(made, width=width)
    heard = said(page, "step-parts")
    for i, (name, trace) in enumerate(made["traces"].items()):
        count = sum(sums["steps"] for sums in trace["parts_ms"].values())
        means = [sum(s[part] for s in trace["parts_ms"].values()) / count for part in PARTS]
        for text, mean in zip(heard[6 * i : 6 * i + 6], means, strict=True):
            assert text.startswith(f"{name}, ")
            number = f"{mean:.1f}" if mean >= 10 else f"{mean:.3g}"
            assert f": {number} of {sum(means):.1f} ms a step" in text
    assert len(heard) == 6 * 3
    assert [text.split(", ", 1)[1].split(":")[0] for text in heard[:3]] == [
        "input and frozen blocks, forward",
        "blocks that train, head and loss, forward",
        "backward",
    ]
    table = page.inner_text("#step-parts details").replace("\xa0", " ")
    assert made["traces"]["dynamic_suffix"]["parts_ms"].keys() == {"3", "6"}
    assert table.count("dynamic_suffix") == 0  # closed
    page.click("#step-parts summary")
    assert page.inner_text("#step-parts table").count("dynamic_suffix") == 3  # 3, 6, all
    bars = page.query_selector_all("#step-parts .plot > svg:visible > path[style*='trained)']")
    assert hovered(page, "step-parts", bars[1]) == heard[2]


def test_memory_by_blocks(opened):
    made = result()
    page = opened(made)
    assert said(page, "memory") == [
        f"{name}, {k} blocks train: {(int(k) + 1) * 1e6 / MIB:.1f} MiB kept for backward"
        for name, trace in made["traces"].items()
        for k in trace["memory"]
    ]
    assert "kept for backward, MiB" in page.text_content("#memory svg.wide")
    assert "On a CPU" in page.inner_text("#memory")
    made["config"]["resolved_device"] = "cuda"
    page = opened(made)
    assert "peak, MiB" in page.text_content("#memory svg.wide")
    assert "On a GPU" in page.inner_text("#memory")
    assert said(page, "memory")[0] == f"full_update, 6 blocks train: {7e6 / MIB:.1f} MiB peak"


def test_memory_where_only_the_most_is_known(opened):
    made = result()
    for row, trace in zip(made["results"], made["traces"].values(), strict=True):
        row["peak_bytes"] = {"full_update": 9_000_000, "static_suffix": None}.get(
            row["schedule"], 5_000_000
        )
        del trace["memory"]
    assert said(opened(made), "memory") == [
        f"full_update, {9e6 / MIB:.1f} MiB kept for backward",
        f"dynamic_suffix, {5e6 / MIB:.1f} MiB kept for backward",
    ]


def test_what_was_not_recorded_is_not_drawn():
    made = result()
    for row, trace in zip(made["results"], made["traces"].values(), strict=True):
        row["peak_bytes"] = None
        for field in ("memory", "parts_ms"):
            del trace[field]
        trace["step_times_ms"] = [None] * len(trace["step_times_ms"])
    assert body(made) == ""
    assert body(CORNERS["no schedule yet"]()) == ""
    original = evidence(CORNERS["the original's"](), "it")
    assert steps.step_times(original)
    assert steps.parts(original) == steps.memory(original) == ""


@pytest.mark.parametrize("case", CORNERS)
def test_every_corner_is_drawn_in_numbers(case):
    drawn = body(CORNERS[case]())
    assert not re.search(r"NaN|nan|None|\binf\b", drawn)
    assert "<script>alert" not in drawn


@pytest.mark.parametrize("case", ["ordinary", "one step of one block", "nulls", "markup"])
def test_nothing_is_outside_of_its_drawing(case, opened):
    page = opened(CORNERS[case]())
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_many_schedules_at_every_depth_fit(width, opened):
    n = 18
    made = result(steps=2 * n, n=n, names=tuple("abcdefgh"))
    for trace in made["traces"].values():
        trace["active_layers_hist"] = [1 + t // 2 for t in range(2 * n)]
        del trace["active_blocks"]
    html = body(made)
    assert len(html) < 200_000
    page = opened(made, width=width)
    shown = values(page, "step-times")
    assert [len(s["texts"]) for s in shown["series"]] == [n] * 8
    places = sorted(x for s in shown["wide" if width > 760 else "narrow"] for x in s[::2])
    assert len(set(places)) == 8 * n  # none hides another
    lines = page.query_selector_all("#step-times .plot > svg:visible path.line")
    assert len(lines) >= 8
