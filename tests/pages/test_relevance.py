"""Relevance on the page: shares add up, each probe tells its own numbers, what lacks is said."""

import html
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pages.chart import NARROW, WIDE
from bench.pages.evidence import Evidence, Probe, load
from bench.pages.relevance import relevance
from bench.pages.shares import shares
from tests.pages.cases import RECORDING
from tests.pages.runs import painted, run_of

LACKING = [(0.0, 0.0), (1.0, -0.5), (1.0, math.nan), (math.inf, 1.0)]


def figures_of(made: Evidence) -> str:
    return relevance(made, made.runs[-1])


def told(figures: str) -> list[list[str]]:
    """What each figure says, point by point."""
    data = re.findall(r'<script type="application/json">(.*?)</script>', figures)
    return [
        [words for one in json.loads(each)["series"] for words in one["texts"]] for each in data
    ]


def notes(figures: str) -> list[str]:
    return [html.unescape(note) for note in re.findall(r'<p class="note">(.*?)</p>', figures)]


def by_block(words: str) -> dict[int, tuple[float, float]]:
    """Percent and relevance of each block of a probe's text."""
    found = re.findall(r"(\d+): ([\d.]+) % \(([^)]+)\)", words)
    return {int(block): (float(share), float(score)) for block, share, score in found}


@settings(deadline=None)
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=6))
def test_shares_add_up_in_the_proportions_of_the_scores(scores):
    found = shares(Probe(0, tuple(scores), None))
    assert math.isclose(sum(found), 1)
    assert math.isclose(found[0] * scores[-1], found[-1] * scores[0])


@pytest.mark.parametrize("scores", [None, *LACKING])
def test_what_cannot_be_shared_out(scores):
    assert shares(Probe(0, scores, None)) == []


def test_each_probe_tells_its_shares_and_the_file_s_numbers():
    made = load(RECORDING)
    probes = made.runs[-1].probes
    heat, _ = told(figures_of(made))
    assert len(heat) == len(probes) == 83
    for probe, words in zip(probes, heat, strict=True):
        assert words.startswith(f"probe at step {probe.step}, block 0: ")
        total = sum(probe.relevance)
        assert by_block(words) == {
            block: (
                pytest.approx(100 * score / total, abs=0.0501),
                pytest.approx(score, rel=5e-4),
            )
            for block, score in enumerate(probe.relevance)
        }


def test_each_block_against_equal_shares():
    made = run_of(2, [{0, 1}] * 4, [0, 1, 2, 3], [(1, 3), (1, 3), (2, 3), (6, 4)])
    _, blocks = told(figures_of(made))
    assert blocks[0] == (
        "block 0: 37.5 % on average of 4 probes, from 25.0 % to 60.0 %; 60.0 % in the last, step 3"
    )
    assert notes(figures_of(made))[1] == (
        "If all blocks counted alike, each would have 50.0 %. On average of the probes the blocks "
        "lie between 37.5 % (block 0) and 62.5 % (block 1), in the last one between 40.0 % (block "
        "1) and 60.0 % (block 0). Block 1 had the largest share in 3 of 4 probes."
    )


def test_more_is_more_opaque():
    scores = [(share, 10 - share) for share in (0.1, 3, 4, 5, 6, 7, 9.9)]
    figures = figures_of(run_of(2, [{0, 1}] * 7, range(7), scores))
    rising, falling = painted(figures.partition('class="narrow"')[0], 2, 7)
    assert rising == sorted(rising) == falling[::-1]
    assert len(set(rising)) == 6
    assert rising[3] == falling[3]  # half each


def test_what_lacks_is_left_out_and_said():
    made = run_of(2, [{0, 1}] * 5, range(5), [(1, 3), *LACKING])
    heat, blocks = told(figures_of(made))
    assert [words.endswith(": no relevance to share out") for words in heat] == [False] + [True] * 4
    assert "of 1 probes" in blocks[0]
    assert "4 of 5 probes have no relevance that could be shared out" in notes(figures_of(made))[0]
    assert not re.search("NaN|nan|inf", figures_of(made).replace("not finite", ""))


def test_nothing_to_show():
    assert figures_of(run_of(2, [{0, 1}])) == ""
    assert figures_of(run_of(2, [{0, 1}] * 4, range(4), LACKING)) == ""
    assert figures_of(run_of(1, [{0}], [0])) == ""


@pytest.mark.parametrize("n", [8, 36])
def test_many_probes_are_drawn_together(n):
    probes = range(0, 5000, 2)
    scores = [[step % 7 + block + 1 for block in range(n)] for step in probes]
    figures = figures_of(run_of(n, [range(n)] * 5000, probes, scores))
    heat, blocks = told(figures)
    assert len(heat) <= 300
    assert sum(int(re.match(r"means of (\d+) probes", words)[1]) for words in heat) == 2500
    size = int(re.search(r"A column stands for (\d+) probes", notes(figures)[0])[1])
    mean = sum(row[0] / sum(row) for row in scores[:size]) / size
    assert by_block(heat[0])[0][0] == pytest.approx(100 * mean, abs=0.051)
    assert "on average of 2500 probes" in blocks[0]
    assert len(figures) < 120_000  # both widths, and what is said


@pytest.mark.parametrize("width", [390, 1280])
def test_in_the_browser(width, open_page, whole):
    made = load(RECORDING)
    figures = figures_of(made)
    heat, blocks = told(figures)
    opened = open_page(whole(figures), width=width, dark=width == 390)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    for figure, expected in zip(opened.query_selector_all("figure"), (heat, blocks), strict=True):
        figure.scroll_into_view_if_needed()
        svg = next(one for one in figure.query_selector_all(".plot > svg") if one.is_visible())
        box = svg.bounding_box()
        scale = box["width"] / (WIDE if width == 1280 else NARROW)
        left = 52 if expected is heat else 60
        column = (box["width"] - (left + 16) * scale) / len(expected)
        for i in (0, len(expected) // 2, len(expected) - 1):
            x = box["x"] + left * scale + column * (i + 0.5)
            opened.mouse.move(x, box["y"] + box["height"] * 0.6)
            assert figure.query_selector(".tip").inner_text() == expected[i]
    opened.click("summary")
    assert opened.locator("tr").count() == 1 + 18


def test_freezing_begins_before_its_first_probe():
    figures = figures_of(load(RECORDING))
    assert "freezing begins, step 364" in figures
    before = 54
    for width in (WIDE, NARROW):
        assert f'd="M{52 + before / 83 * (width - 68):.1f} ' in figures
