"""The figures of a study: what is drawn is where the file says, also at the edges."""

import json
import re

import pytest

from bench.pages import study_curves
from bench.pages.chart import WIDE
from bench.pages.study_blocks import blocks
from bench.pages.study_curves import spread
from bench.pages.study_intervals import arm_rows, intervals, pair_rows
from bench.pages.study_numbers import in_order, looks_of, window
from tests.pages.studies import CORNERS, failing, study


def drawn(content: dict) -> str:
    arms = content["tasks"]["text"]["arms"]
    rows = arm_rows(arms, "full_update", looks_of(content))
    null = arms[content["null"]]["loss"] if content["null"] else None
    return intervals("a", "a title", rows, content["margin"], null, "a note")


def values(figure: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])


def said(figure: str) -> dict[str, list[str]]:
    return {each["name"]: each["texts"] for each in values(figure)["series"]}


def scale(figure: str):
    """From a change in percent to a pixel, by the axis's numbers."""
    svg = re.search(r'<svg class="wide".*?</svg>', figure)[0]
    found = re.findall(r'class="tick" x="([^"]+)"[^>]*"middle">([^<]+)', svg)
    (x0, v0), (x1, v1) = [(float(x), float(v)) for x, v in (found[0], found[-1])]
    return lambda value: x0 + (value - v0) / (v1 - v0) * (x1 - x0)


def test_points_lie_where_the_file_says():
    content = study()
    figure = drawn(content)
    to_pixel, made = scale(figure), values(figure)
    arms = content["tasks"]["text"]["arms"]
    base = [cell["final_val_loss"] for cell in arms["full_update"]["cells"]]
    for series, places in zip(made["series"], made["wide"], strict=True):
        arm = arms[series["name"].partition(" (")[0]]
        losses = [cell["final_val_loss"] for cell in arm["cells"]]
        changes = [a / b - 1 for a, b in zip(losses, base, strict=True)]
        for x, change in zip(places[::2], [arm["loss"]["mean"], *changes], strict=True):
            assert x == pytest.approx(to_pixel(100 * change), abs=0.6)


def test_the_noise_floor_and_the_interval_are_the_files():
    content = study()
    figure = drawn(content)
    to_pixel = scale(figure)
    svg = re.search(r'<svg class="wide".*?</svg>', figure)[0]
    band = re.search(r'var\(--frozen\)" d="M([\d.]+) [\d.]+H([\d.]+)', svg)
    arms = content["tasks"]["text"]["arms"]
    null = arms["again"]["loss"]
    ends = [to_pixel(100 * null[end]) for end in ("low", "high")]
    assert [float(x) for x in band.groups()] == pytest.approx(ends, abs=0.6)
    bars = re.findall(r'stroke-width:1.5;fill:none" d="M([\d.]+) \d+H([\d.]+)M', svg)
    grow = [to_pixel(100 * arms["grow"]["loss"][end]) for end in ("low", "high")]
    assert [float(x) for x in bars[0]] == pytest.approx(grow, abs=0.6)


def test_arms_are_in_order_of_their_loss_and_losers_are_there():
    assert list(said(drawn(study()))) == [
        "grow", "again", "top4", "lisa", "slow (planted: time x1.5)"
    ]  # fmt: skip
    broken = said(drawn(failing()))
    assert list(broken)[-1] == "lisa (10 of 10 failed)"
    assert broken["lisa (10 of 10 failed)"] == ["no loss to compare: INCONCLUSIVE"]
    assert len(broken["top4 (1 of 10 failed)"]) == 1 + 8  # of two seeds one of the pair failed


def test_verdicts_stand_in_the_drawing_on_screens_and_phones():
    figure = drawn(study())
    for kind in ("wide", "narrow"):
        svg = re.search(rf'<svg class="{kind}".*?</svg>', figure)[0]
        words = re.findall(r'text-anchor="end"[^>]*>([A-Z ]+)<', svg)
        assert words == ["WIN", "NO DIFFERENCE", "NO DIFFERENCE", "LOSS", "LOSS"]


def test_what_lies_beyond_the_axis_is_an_arrow_and_said():
    figure = drawn(CORNERS["huge"]())
    assert "The axis ends" in figure
    assert "+1e+08 %" in figure
    for places in values(figure)["wide"]:
        assert all(0 <= x <= WIDE for x in places[::2])
    assert "The axis ends" not in drawn(study())


@pytest.mark.parametrize("case", ["one seed", "null bounds"])
def test_without_bounds_there_is_no_interval(case):
    found = said(drawn(CORNERS[case]()))
    assert "(no interval): " in found["grow"][0]
    svg = re.search(r'<svg class="wide".*?</svg>', drawn(CORNERS[case]()))[0]
    assert 'stroke-width:1.5;fill:none" d=' not in svg


def test_pairs_are_against_the_rival():
    content = study()
    arms = content["tasks"]["text"]["arms"]
    (row,) = pair_rows(arms, looks_of(content))
    grow, top4 = ([c["final_val_loss"] for c in arms[a]["cells"]] for a in ("grow", "top4"))
    assert row.name == "grow against top4"
    wanted = [a / b - 1 for a, b in zip(grow, top4, strict=True)]
    assert [change for _, change in row.seeds] == pytest.approx(wanted)


def test_the_window_shows_the_best_and_the_margin():
    assert window([-0.02, 0.5], -0.02, 0.01) == pytest.approx((-0.027, 0.157), abs=2e-3)
    assert window([-5.0, 5.0], -0.02, 0.01) == pytest.approx((-0.058, 0.158), abs=1e-6)
    low, high = window([], 0.0, 0.01)
    assert low < -0.01 < 0.01 < high


def test_a_spread_is_the_mean_and_range_of_lines_between_validations():
    one, two = [(0.0, 4.0), (0.5, 2.0), (1.0, 1.0)], [(0.0, 4.0), (0.4, 3.0), (1.0, 1.5)]
    first, middle, last = spread([one, two])
    between = 3.0 - 1.5 * 0.1 / 0.6
    assert first[1:] == (4.0, 4.0, 4.0, 2)
    assert middle[:4] == pytest.approx((0.5, (2 + between) / 2, 2.0, between))
    assert last[1:4] == (1.25, 1.0, 1.5)


def test_curves_leave_out_what_failed_and_say_so():
    content = failing()
    looks = looks_of(content)
    task = content["tasks"]["text"]
    figure = study_curves.losses("a", task, "full_update", looks)
    assert [name.partition(" (")[0] for name in said(figure)] == [
        "full_update", "again", "grow", "top4", "slow"
    ]  # fmt: skip
    finals = [c["final_val_loss"] for c in task["arms"]["grow"]["cells"]]
    mean, low, high = (f"{f:.4f}" for f in (sum(finals) / 10, min(finals), max(finals)))
    assert said(figure)["grow"][-1] == f"100.0 % of the time: {mean} ({low} to {high})"
    ahead = study_curves.leads("a", task, "full_update", looks, 0.01)
    assert "full_update" not in said(ahead)
    assert said(ahead)["grow"][-1].startswith("100.0 % of the time: -2.9")


def test_twenty_arms_are_split_and_their_colours_differ():
    content = CORNERS["twenty arms"]()
    looks = looks_of(content)
    made = study_curves.losses("a", content["tasks"]["text"], "full_update", looks)
    figures = re.findall(r"<figure.*?</figure>", made, re.S)
    assert len(figures) == 4
    for figure in figures:
        names = list(said(figure))
        assert names[0] == "full_update"
        assert len({looks[name].color for name in names}) == len(names) == 6
    assert len({(look.color, look.dash, look.marker) for look in looks.values()}) == 21


def test_arms_that_did_not_run_take_no_colour_from_those_that_did():
    content = CORNERS["twenty arms"]()
    arms = content["tasks"]["text"]["arms"]
    ran = ["full_update", "arm_0", "arm_7", "arm_14"]  # of one colour if all were counted
    for name in set(arms) - set(ran):
        arms[name]["cells"] = []
    looks = looks_of(content)
    assert len({looks[name].color for name in ran}) == 4


def test_blocks_are_counted_over_all_seeds():
    content = study()
    arms = content["tasks"]["text"]["arms"]
    figure = blocks("a", arms, ["full_update", *in_order(arms, "full_update")])
    found = said(figure)
    assert found["full_update"] == ["blocks that trained: 8 in 100.0 % of the steps"]
    assert found["grow"][0] == "blocks that trained: 1 in 12.9 % of the steps"
    mean = (40 * 1 + 200 * 4 + 30 * 6 + 40 * 8) / 310
    assert f"{mean:.1f} of 8 on average" in figure
