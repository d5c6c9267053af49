"""How schedules look: the same colour, dashes and marker on every figure.

The colours stay apart for the colour-blind and against the background (tests/pages/test_looks.py
says by how much); dashes and markers tell lines apart without them.
"""

from typing import NamedTuple

LIGHT = {
    "c0": "#191518", "c1": "#252fb9", "c2": "#7c1d5e", "c3": "#179f91", "c4": "#ef5717",
    "c5": "#a050e4", "c6": "#615616", "c7": "#34758e",
    "ink": "#1b1d20", "soft": "#5a6068", "grid": "#e3e4e2", "paper": "#fdfdfb",
    "warm": "#b3261e", "frozen": "#dfe3e8", "trained": "#3f6f9f",
    "absent": "#d9b45f",
}  # fmt: skip
DARK = {
    "c0": "#f0f6e9", "c1": "#3f62ea", "c2": "#985e78", "c3": "#6cb6aa", "c4": "#f17c03",
    "c5": "#b98af7", "c6": "#e0cf7c", "c7": "#6ad9fe",
    "ink": "#e8e9ea", "soft": "#a3a9b1", "grid": "#2f343a", "paper": "#14171b",
    "warm": "#ff8a75", "frozen": "#2a3038", "trained": "#6ea3d6",
    "absent": "#6a5320",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"


CSS = f"{_variables(LIGHT)}\n@media (prefers-color-scheme:dark){{{_variables(DARK)}}}\n"

# By matplotlib's letters, as SVG paths that start at the marker's centre.
SHAPES = {
    "o": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "m-3.6-3.6h7.2v7.2h-7.2z",
    "v": "m0 5l-4.8-8.4h9.6z",
    "D": "m0-5l5 5l-5 5l-5-5z",
    "^": "m0-5l4.8 8.4h-9.6z",
    "P": "m-1.5-4.8h3v3.3h3.3v3h-3.3v3.3h-3v-3.3h-3.3v-3h3.3z",
    "X": "m0-2l2.6-2.6l2 2l-2.6 2.6l2.6 2.6l-2 2l-2.6-2.6l-2.6 2.6l-2-2l2.6-2.6l-2.6-2.6l2-2z",
    "*": "m0-5.6l1.4 3.7l3.9.2l-3 2.5l1 3.8l-3.3-2.1l-3.3 2.1l1-3.8l-3-2.5l3.9-.2z",
}
DASHES = ("", "9 4", "2 4", "12 4 2 4", "18 4", "6 6", "9 4 2 4 2 4", "4 4 12 4")

# The first eight have a colour of their own; nobody shares full_update's, which every figure has.
_KNOWN = (
    "full_update", "full_update+fused", "full_update#2", "static_suffix", "dynamic_suffix",
    "grow", "payoff", "random_suffix",
    "lisa", "cyclic", "freezeout", "autofreeze", "grades", "row_suffix", "lora",
)  # fmt: skip
_OWN_COLOURS = (5, 6, 7)


class Look(NamedTuple):
    """`color` is the number of a CSS variable, `dash` an SVG dash pattern ("" is solid), `marker`
    a letter of matplotlib's."""

    color: int
    dash: str
    marker: str


def look(schedule: str, i: int) -> Look:
    """How to draw a schedule, the `i`-th of its file: `i` decides only for names of one's own.

    Those share three colours. Schedules of one colour tell apart by dash and marker.
    """
    if schedule in _KNOWN:
        place = _KNOWN.index(schedule)
        color = place if place < 8 else place - 7
        dash, marker = (color, color) if place < 8 else (color + 3, color + 5)
    else:
        color, dash, marker = _OWN_COLOURS[i % 3], 5 + i, 6 + i
    return Look(color, DASHES[dash % len(DASHES)], tuple(SHAPES)[marker % len(SHAPES)])
