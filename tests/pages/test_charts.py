"""Figures in a browser: values on hover, touch and keys; and what they are made of."""

import json
import re

import pytest

from bench.pages.chart import (
    WIDE,
    Drawing,
    Frame,
    Series,
    figure,
    legend_of,
    scrolling,
    text,
    ticks,
)
from bench.pages.looks import look

NASTY = "</script><b onclick=x>&'\""
VALUES = {"full_update": [5.0, 3.0, 2.5], NASTY: [4.0, 1.0, 0.5, 0.25], "none": []}


def drawing(width: float) -> Drawing:
    frame = Frame(width, 300, x=(0, 3), y=(0, 5))
    svg = frame.axes("time, seconds", "loss, nats per byte")
    series = []
    for i, (name, values) in enumerate(VALUES.items()):
        points = list(enumerate(values))
        svg += frame.line(points, look(name, i)) + frame.markers(points, look(name, i))
        said = [(frame.px(x), frame.py(y), f"step {x}: {y}") for x, y in points]
        series.append(Series(name, said))
    return Drawing(300, svg, series)


TABLE = "<table><tr><td>" + "<td>".join(["wide cell"] * 60) + "</table>"


def made() -> str:
    entries = [(name, look(name, i)) for i, name in enumerate(VALUES)]
    return figure(
        "fig", f"Title {NASTY}", drawing, note="a < b", legend=legend_of(entries), table=TABLE
    )


@pytest.fixture
def page(open_page, whole):
    return open_page(whole(made()))


@pytest.mark.parametrize(
    ("body", "noticed"),
    [
        ("<script>console.error('said')</script>", "said"),
        ("<script>throw new Error('thrown')</script>", "thrown"),
        ("<img src='beside.png'>", "beside.png"),
    ],
)
def test_what_is_wrong_with_a_page_is_noticed(open_page, body, noticed):
    open_page(body)
    assert noticed in " ".join(open_page.wrong)
    open_page.wrong.clear()


def said(page) -> str:
    """What is said, to the eye beside the point and below the figure."""
    tip, line = page.locator(".tip"), page.locator(".said")
    assert tip.is_visible() == page.locator(".dot").is_visible()
    assert line.text_content() == (tip.text_content() if tip.is_visible() else "")
    return line.text_content()


def at(page, x: float, y: float):
    """The mouse's place over a value of the visible plot."""
    plot = page.locator(".plot > svg:visible")
    box, width = plot.bounding_box(), float(plot.get_attribute("viewBox").split()[2])
    frame, scale = Frame(width, 300, x=(0, 3), y=(0, 5)), box["width"] / width
    return box["x"] + frame.px(x) * scale, box["y"] + frame.py(y) * scale


@pytest.mark.parametrize("width", [1280, 390])
def test_hover_says_the_nearest_point(open_page, whole, width):
    page = open_page(whole(made()), width)
    for name, values in VALUES.items():
        for x, y in enumerate(values):
            left, top = at(page, x, y)
            page.mouse.move(left + 4, top - 3)
            assert said(page) == f"{name}, step {x}: {y}"
            dot = page.locator(".dot").bounding_box()
            assert dot["x"] + dot["width"] / 2 == pytest.approx(left, abs=0.6)
            assert dot["y"] + dot["height"] / 2 == pytest.approx(top, abs=0.6)
            tip = page.locator(".tip").bounding_box()
            assert tip["x"] >= 0
            assert tip["x"] + tip["width"] <= width
    page.mouse.move(2, 2)
    assert said(page) == ""


def test_keys(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "fig"
    for key, value in [
        ("ArrowRight", "full_update, step 0: 5.0"),
        ("ArrowLeft", "full_update, step 0: 5.0"),
        ("End", "full_update, step 2: 2.5"),
        ("ArrowRight", "full_update, step 2: 2.5"),
        ("ArrowDown", f"{NASTY}, step 2: 0.5"),
        ("ArrowDown", f"{NASTY}, step 2: 0.5"),
        ("ArrowRight", f"{NASTY}, step 3: 0.25"),
        ("ArrowUp", "full_update, step 2: 2.5"),
        ("ArrowLeft", "full_update, step 1: 3.0"),
        ("Home", "full_update, step 0: 5.0"),
        ("Escape", ""),
        ("ArrowLeft", "full_update, step 2: 2.5"),
    ]:
        page.keyboard.press(key)
        assert said(page) == value, key
    page.keyboard.press("Tab")
    assert said(page) == ""


def test_keys_in_the_table_are_its_own(page):
    page.locator("summary").focus()
    page.keyboard.press("ArrowRight")
    assert said(page) == ""


def test_a_tap_stays(open_page, whole):
    page = open_page(whole(made()), 390, has_touch=True)
    page.touchscreen.tap(*at(page, 1, 3.0))
    assert said(page) == "full_update, step 1: 3.0"


def test_another_width_moves_what_is_shown(page):
    page.locator("figure").focus()
    page.keyboard.press("End")
    before = page.locator(".dot").bounding_box()["x"]
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function(
        "x => document.querySelector('.dot').getBoundingClientRect().x !== x", arg=before
    )
    dot = page.locator(".dot").bounding_box()
    assert dot["x"] + dot["width"] / 2 == pytest.approx(at(page, 2, 2.5)[0], abs=0.6)


@pytest.mark.parametrize("width", [1280, 800, 390, 320])
def test_no_page_is_wider_than_its_window(open_page, whole, width):
    page = open_page(whole(made() + scrolling(TABLE)), width)
    page.locator("summary").click()
    assert page.locator("details table").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    size = page.evaluate("""() => {
        const svg = [...document.querySelectorAll('.plot > svg')].find(s => s.clientWidth);
        return 12 * svg.clientWidth / svg.viewBox.baseVal.width;
    }""")
    assert 9.5 <= size <= 17  # pixels that text of 12 has there


def test_without_javascript_all_but_the_hover_is_there(open_page, whole):
    page = open_page(whole(made()), java_script_enabled=False)
    assert page.locator("svg.wide").is_visible()
    assert page.get_by_text("a < b").is_visible()
    assert not page.get_by_text("hover").is_visible()
    page.locator("summary").click()
    assert page.locator("table").is_visible()


def test_dark_is_dark(open_page, whole):
    colours = [
        open_page(whole(made()), dark=dark).evaluate(
            "getComputedStyle(document.body).backgroundColor + "
            "getComputedStyle(document.querySelector('.plot .line')).stroke"
        )
        for dark in (False, True)
    ]
    assert colours == ["rgb(253, 253, 251)rgb(25, 21, 24)", "rgb(20, 23, 27)rgb(240, 246, 233)"]


def test_markup_in_names_is_text(page):
    assert page.locator("b").count() == 0
    assert page.locator("figcaption").text_content() == f"Title {NASTY}"
    assert page.locator(".legend li").nth(1).text_content() == NASTY
    assert text(NASTY) == "&lt;/script&gt;&lt;b onclick=x&gt;&amp;&#x27;&quot;"


def test_a_phone_says_what_a_screen_says():
    def draw(width: float) -> Drawing:
        return Drawing(10, "", [Series("one", [(1, 2, "short" if width < WIDE else "long")])])

    with pytest.raises(ValueError, match="'fig' must say the same"):
        figure("fig", "title", draw)


def test_scales():
    frame = Frame(880, 300, x=(10, 20), y=(1, 3))
    assert frame.px(10) == frame.left
    assert frame.px(20) == 880 - frame.right
    assert frame.py(3) == frame.top
    assert frame.py(1) == 300 - frame.bottom
    axes = frame.axes("time, seconds", "loss")
    assert "time, seconds</text>" in axes
    assert re.findall(r'text-anchor="end">([^<]+)', axes) == ["1.0", "1.5", "2.0", "2.5", "3.0"]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0, 42.3, 5, [0, 10, 20, 30, 40]),
        (1.6, 2.4, 4, [1.6, 1.8, 2.0, 2.2, 2.4]),
        (-3, 3, 3, [-2, 0, 2]),
        (0, 1e-4, 2, [0, 5e-5, 1e-4]),
    ],
)
def test_ticks_are_round(low, high, most, expected):
    assert ticks(low, high, most) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-300, 1e30, 1.7e308])
def test_one_value_alone_has_an_axis(value):
    frame = Frame(880, 300, x=(value, value), y=(value, value))
    assert frame.top < frame.py(value) < 300
    assert "nan" not in frame.axes("x", "y")
    assert frame.axes("x", "y").count("tick") >= 4


def test_a_line_breaks_where_there_is_no_value():
    frame = Frame(880, 300, x=(0, 4), y=(0, 1))
    path = frame.path([(0, 0.5), (1, 0.5), (2, None), (3, 0.5), (4, None)])
    assert [part.count("L") for part in path.split("M")[1:]] == [1, 0]
    assert path.endswith("h0")  # a value alone is a dot
    assert frame.line([(0, None)], look("full_update", 0)) == ""
    assert frame.markers([(0, None)], look("full_update", 0)) == ""


def test_what_is_far_out_stays_a_number_that_browsers_draw():
    frame = Frame(880, 300, x=(0, 1), y=(0, 1))
    assert frame.py(1e38) == -frame.py(-1e38) == -9999.0


def test_values_are_strict_json():
    found = re.search(r'<script type="application/json">(.*?)</script>', made())
    data = json.loads(found[1])
    assert [s["name"] for s in data["series"]] == list(VALUES)
    assert len(data["wide"][0]) == len(data["narrow"][0]) == 2 * len(VALUES["full_update"])
