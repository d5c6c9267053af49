"""Schedules can be told apart: by the colour-blind, on either background, and without colour.

The simulation is Machado, Oliveira and Fernandes 2009 at severity 1, in linear RGB; the distance is
Euclidean in OKLab (Ottosson 2020), where 0.02 is about what is just noticed side by side.
"""

import itertools

import pytest

from bench.pages.looks import CSS, DARK, DASHES, LIGHT, SHAPES, look

KNOWN = ("full_update", "full_update+fused", "full_update#2", "static_suffix", "dynamic_suffix")
FROM_THE_FIELD = ("random_suffix", "lisa", "cyclic", "freezeout", "autofreeze", "grades", "lora")
OURS = ("grow", "payoff", "row_suffix")
APART, APART_ALL = 0.15, 0.11  # the first five, which one sees together; all eight

RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
LMS_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
SEEN = {
    "as they are": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def times(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def linear(colour: str) -> list[float]:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def oklab(rgb: list[float]) -> list[float]:
    lms = times(RGB_TO_LMS, [min(max(v, 0.0), 1.0) for v in rgb])
    return times(LMS_TO_LAB, [v ** (1 / 3) for v in lms])


def distance(one: str, other: str, seen) -> float:
    a, b = (oklab(times(seen, linear(colour))) for colour in (one, other))
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.1, 1 to 21."""
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(
        sum(w * v for w, v in zip(weights, linear(colour), strict=True)) for colour in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(params=[LIGHT, DARK], ids=["light", "dark"])
def theme(request) -> dict[str, str]:
    return request.param


@pytest.mark.parametrize("seen", SEEN)
def test_colours_are_apart(theme, seen):
    colours = [theme[f"c{i}"] for i in range(8)]
    for a, b in itertools.combinations(range(8), 2):
        least = APART if b < len(KNOWN) else APART_ALL
        assert distance(colours[a], colours[b], SEEN[seen]) >= least, (a, b)


@pytest.mark.parametrize("seen", SEEN)
def test_states_of_a_block_and_probes_are_apart(theme, seen):
    for a, b in itertools.combinations(("trained", "frozen", "warm", "absent"), 2):
        assert distance(theme[a], theme[b], SEEN[seen]) >= APART_ALL, (a, b)


def test_contrast(theme):
    for name in (*(f"c{i}" for i in range(8)), "warm", "trained"):
        assert contrast(theme[name], theme["paper"]) >= 3.0, name
    for name in ("ink", "soft"):
        assert contrast(theme[name], theme["paper"]) >= 4.5, name


def test_themes_have_the_same_names():
    assert LIGHT.keys() == DARK.keys()
    assert CSS.count("--paper:") == 2
    assert f"--c0:{DARK['c0']};" in CSS[CSS.index("prefers-color-scheme:dark") :]


def test_known_schedules_look_the_same_everywhere_and_differ_in_all():
    looks = [look(name, 0) for name in KNOWN]
    assert [look(name, i + 3) for i, name in enumerate(KNOWN)] == looks
    for field in zip(*looks, strict=True):
        assert len(set(field)) == len(KNOWN)


def test_those_that_share_a_colour_differ_in_dash_and_marker():
    looks = [look(name, 0) for name in (*KNOWN, *FROM_THE_FIELD, *OURS)]
    assert looks == [look(name, 9) for name in (*KNOWN, *FROM_THE_FIELD, *OURS)]
    for one, other in itertools.combinations(looks, 2):
        if one.color == other.color:
            assert one.dash != other.dash
            assert one.marker != other.marker
    assert [each.color for each in looks].count(look("full_update", 0).color) == 1
    assert {each.color for each in looks} == set(range(8))


def test_other_schedules_never_look_alike():
    known = [look(name, 0) for name in (*KNOWN, *FROM_THE_FIELD, *OURS)]
    own = [look(f"mine{i}", i) for i in range(12)]
    assert len({*known, *own}) == len(known) + len(own)
    assert len({each.color for each in own[:3]}) == 3
    assert {each.color for each in known[:5]}.isdisjoint(each.color for each in own)
    assert all(each.marker in SHAPES and each.dash in DASHES for each in known + own)
