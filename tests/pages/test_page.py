"""Whole pages in a browser: every corner renders, nothing overflows, hover tells the truth."""

import json
import re

import pytest

from bench.pages.evidence import evidence
from bench.pages.page import comparison, page
from tests.pages.cases import CORNERS, many, result, with_markup

EVERYWHERE = {"settings", "limits"}
SECTIONS = EVERYWHERE | {"schedules", "loss", "trained", "relevance", "time", "memory-use"}


def of(case: str) -> str:
    return page(evidence(CORNERS[case](), case))


def sections(opened) -> set[str]:
    return set(opened.eval_on_selector_all("section", "all => all.map(one => one.id)"))


def wider_than_the_page(opened) -> list[str]:
    """What sticks out, other than inside of a box of its own that scrolls."""
    return opened.evaluate("""() => [...document.body.querySelectorAll("*")].filter(one =>
        !one.closest(".scroll, pre, details:not([open])") && one.getClientRects().length
        && one.closest("svg") === null
        && one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
    ).map(one => one.outerHTML.slice(0, 80))""")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("case", CORNERS)
def test_corners_render(case, width, open_page):
    opened = open_page(of(case), width=width)
    assert sections(opened) >= EVERYWHERE
    assert opened.inner_text("h1")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert wider_than_the_page(opened) == []
    shown = opened.inner_text("body")
    assert not re.search(r"\b(nan|None|undefined|inf)\b|NaN|Infinity", shown), shown
    drawn = opened.content()
    assert not re.search(r'="[^"]*(NaN|\binf\b)', drawn)


def test_every_section_of_a_whole_result(open_page):
    opened = open_page(of("ordinary"))
    assert sections(opened) == SECTIONS
    first = opened.evaluate("document.body.querySelector('h1').textContent")
    assert first == "Keep dynamic_suffix (an indication: one seed)."
    assert opened.inner_text("pre") == "python bench/run.py --dmodel 32"
    assert "0" * 64 in opened.inner_text("#settings")
    ids = opened.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))


def test_the_original_experiment(open_page):
    opened = open_page(of("the original's"))
    assert sections(opened) == SECTIONS - {"memory-use"}
    assert "83" in opened.inner_text("#trained")
    assert len(opened.query_selector_all("#trained figure")) == 2  # full_update needs no map
    assert "Not recorded" in opened.inner_text("#limits")


@pytest.mark.parametrize("width", [390, 1280])
def test_axes_have_labels_with_units(width, open_page):
    opened = open_page(of("ordinary"), width=width)
    for figure in opened.query_selector_all("figure.chart"):
        shown = [
            one.text_content()
            for one in figure.query_selector_all("svg text.label")
            if one.is_visible()
        ]
        about = figure.get_attribute("id")
        units = r"loss|step|block|\(s\)|\(min\)|\bs\b|ms|MiB|%|seconds|minutes"
        assert len(shown) >= 1, about
        assert any(re.search(units, label) for label in shown), (about, shown)


def hovered(opened, selector: str) -> list[str]:
    """What the figure says as the mouse goes over it from left to right."""
    figure = opened.query_selector(selector)
    figure.scroll_into_view_if_needed()
    svg = next(one for one in figure.query_selector_all(".plot > svg") if one.is_visible())
    box = svg.bounding_box()
    said = []
    for x in range(int(box["x"]), int(box["x"] + box["width"]), 4):
        opened.mouse.move(x, box["y"] + box["height"] / 2)
        said.append(figure.query_selector(".said").inner_text())
    return said


@pytest.mark.parametrize("width", [390, 1280])
def test_hover_says_the_losses_of_the_file(width, open_page):
    content = result()
    opened = open_page(page(evidence(content, "a run")), width=width)
    id_ = opened.eval_on_selector("#loss figure", "one => one.id")
    said = "\n".join(hovered(opened, f"[id='{id_}']"))
    losses = {
        f"{point['val_loss']:.4f}"
        for trace in content["traces"].values()
        for point in trace["val_trace"]
    }
    found = set(re.findall(r"\d\.\d{4}\b", said))
    assert len(found) >= 5
    assert found <= losses


def test_the_keyboard_reaches_every_figure(open_page):
    opened = open_page(of("ordinary"))
    figures = opened.query_selector_all("figure.chart")
    assert len(figures) >= 6
    for figure in figures:
        figure.focus()
        opened.keyboard.press("ArrowRight")
        first = figure.query_selector(".said").inner_text()
        assert first, figure.get_attribute("id")
        opened.keyboard.press("End")
        assert figure.query_selector(".said").inner_text()
        opened.keyboard.press("Escape")
        assert not figure.query_selector(".tip").is_visible()


def test_markup_in_names_stays_text(open_page):
    name = "</title><b>bold</b>"
    opened = open_page(page(evidence(with_markup(), name)))
    assert opened.title() == f"blocksched: {name}"
    assert opened.query_selector("b") is None
    assert opened.query_selector("img") is None
    assert "<script>alert(1)</script>" in opened.inner_text("body")
    opened.query_selector("figure.chart").focus()
    opened.keyboard.press("End")


def test_a_page_refers_to_no_other_file():
    for case in ("ordinary", "the original's"):
        made = of(case)
        places = re.findall(r"""(?:(?:src|href)\s*=|url\()\s*["']?([^"'>)\s]+)""", made)
        assert {place for place in places if not place.startswith("#")} == {"data:,"}
        assert "@import" not in made


def test_files_side_by_side(open_page):
    one = evidence(result(seed=1), "first")
    slow = result(seed=2)
    slow["config"]["lr"] = 5e-4
    two = evidence(slow, "second")
    original = evidence(CORNERS["the original's"](), "original")
    opened = open_page(comparison([one, two, original]), width=390)
    order = opened.eval_on_selector_all("section", "all => all.map(one => one.id)")
    assert order[:3] == ["differences", "schedules", "loss"]
    differs = opened.inner_text("#differences")
    assert "lr" in differs
    assert "0.0005" in differs
    assert "seed" in differs
    assert "hidden_mult" not in differs  # only the original tells
    assert "hidden_mult" in opened.text_content("#differences details")
    assert "different tasks" in opened.inner_text("#limits")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    ids = opened.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))


def test_the_same_file_twice_does_not_differ():
    text = comparison([evidence(result(), "a"), evidence(result(), "b")])
    assert "Nothing: settings, machine and data agree." in text


def test_a_hundred_thousand_steps_stay_small(open_page):
    content = many()
    made = page(evidence(content, "long"))
    assert len(made.encode()) < 2_000_000
    opened = open_page(made)
    said = json.dumps(opened.eval_on_selector_all("#trained script", "all => all.map(s => s.text)"))
    probes = sum(len(t["probe_steps"]) for t in content["traces"].values())
    counted = [int(k) for k in re.findall(r"; (\d+) probes?\b", said)]
    assert sum(counted) == probes


def test_a_phone_takes_its_own_width(open_page):
    opened = open_page(of("ordinary"), width=390, is_mobile=True, has_touch=True)
    assert opened.evaluate("document.documentElement.clientWidth") == 390


def test_dark(open_page):
    opened = open_page(of("ordinary"), dark=True)
    red, green, blue = map(
        int, re.findall(r"\d+", opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    )
    assert red + green + blue < 150
