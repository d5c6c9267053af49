"""The page of a study in a browser: every corner renders, and it says what the file says."""

import copy
import json
import re

import pytest

from bench.pages.study import study_page
from tests.pages.studies import CORNERS, computed, failing, study, with_markup
from tests.pages.test_page import sections, wider_than_the_page

EVERYWHERE = {"method", "limits", "settings"}


@pytest.mark.parametrize("case", CORNERS)
def test_corners_render(case, open_page):
    content = CORNERS[case]()
    opened = open_page(study_page(content), width=390)
    tasks = {f"task-{i}" for i in range(len(content["tasks"]))}
    assert sections(opened) == EVERYWHERE | tasks
    opened.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width in (390, 1280):
        opened.set_viewport_size({"width": width, "height": 800})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        assert wider_than_the_page(opened) == []
        assert text_outside_of_its_drawing(opened) == []
    shown = opened.inner_text("body")
    assert not re.search(r"\b(nan|None|undefined|inf)\b|NaN|Infinity", shown), shown
    assert not re.search(r'="[^"]*(NaN|\binf\b)', opened.content())
    ids = opened.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))


def text_outside_of_its_drawing(opened) -> list[str]:
    return opened.evaluate("""() => [...document.querySelectorAll("svg[role=img]")].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].filter(one => {
            const its = one.getBoundingClientRect();
            return its.left < box.left - 1 || its.right > box.right + 1;
        }).map(one => one.textContent) })""")


def test_what_a_reader_looks_for(open_page):
    opened = open_page(study_page(study()))
    assert opened.inner_text("h1").startswith("text: grow wins against full_update, loss -2.96 %")
    figures = opened.eval_on_selector_all("figure.chart", "all => all.map(one => one.id)")
    assert figures == ["intervals-0", "against-0", "losses-0-0", "leads-0-0", "blocks-0"]
    body = opened.inner_text("body")
    for said in ("Does growing the stack pay?", "10 seeds", "noise floor", "margin: +-1 %", "99 %",
                 "Student's t", "0123abc", "python bench/study.py", "lisa: LOSS."):  # fmt: skip
        assert said in body
    assert "seeds = [101, 102]" in opened.text_content("#settings details")


def test_the_keyboard_reaches_every_figure(open_page):
    opened = open_page(study_page(study()))
    for figure in opened.query_selector_all("figure.chart"):
        figure.focus()
        for key in ("ArrowRight", "ArrowDown", "End"):
            opened.keyboard.press(key)
            assert figure.query_selector(".said").inner_text(), figure.get_attribute("id")


def test_hover_says_the_interval_and_the_verdict(open_page):
    content = study()
    opened = open_page(study_page(content))
    figure = opened.query_selector("#intervals-0")
    figure.focus()
    opened.keyboard.press("ArrowRight")
    loss = content["tasks"]["text"]["arms"]["grow"]["loss"]
    low, high = 100 * loss["low"], 100 * loss["high"]
    said = f"grow, {100 * loss['mean']:+.2f} % ({low:+.2f} to {high:+.2f} %): WIN"
    assert figure.query_selector(".said").inner_text() == said
    opened.keyboard.press("ArrowRight")
    first = re.match(r"grow, seed 101: ", figure.query_selector(".said").inner_text())
    assert first


def test_markup_in_names_stays_text(open_page):
    opened = open_page(study_page(with_markup()))
    assert opened.title() == "blocksched: <b>x</b><script>alert(1)</script>"
    assert opened.query_selector("b") is None
    assert opened.query_selector("img") is None
    scripts = opened.eval_on_selector_all("script", "all => all.map(one => one.textContent)")
    assert "alert(1)" not in scripts  # a name that became one
    opened.query_selector("figure.chart").focus()
    opened.keyboard.press("End")


def test_a_page_refers_to_no_other_file():
    made = study_page(study())
    places = re.findall(r"""(?:(?:src|href)\s*=|url\()\s*["']?([^"'>)\s]+)""", made)
    assert {place for place in places if not place.startswith("#")} == {"data:,"}


def test_what_failed_is_no_number(open_page):
    opened = open_page(study_page(failing()))
    assert "lisa (10 of 10 failed)" in opened.text_content("#intervals-0 svg.wide")
    rows = opened.eval_on_selector_all("#task-0 table.study tr", "all => all.map(r => r.innerText)")
    (lisa,) = [row.split("\t") for row in rows if row.startswith("lisa")]
    assert lisa[2:6] == ["-", "no interval", "not reached", "70.0 % to no bound"]
    assert "No curve: lisa." in opened.inner_text("#losses-0-0")
    cells = opened.text_content("table.cells")
    assert "21 steps in a row were not finite" in cells
    assert "Cells failed" in opened.inner_text("#limits")


def test_a_search_on_the_computed_clock_judges_nothing(open_page):
    opened = open_page(study_page(computed()), width=390, dark=True)
    assert "a search, which judges nothing; grow ended lowest" in opened.inner_text("h1")
    limits = opened.inner_text("#limits")
    assert "A search judges nothing" in limits
    assert "computed, not measured" in limits
    assert '"measuring": 1.5' in opened.text_content("#settings")


def test_the_page_changes_nothing():
    content = study()
    before = copy.deepcopy(content)
    study_page(content)
    assert content == before
    assert json.loads(json.dumps(content)) == content
