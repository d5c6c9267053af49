"""The page of a result, and of several side by side: one file that needs no other."""

from collections.abc import Sequence
from pathlib import Path

from bench.pages import losses, maps, relevance, steps, words
from bench.pages.chart import scrolling, text
from bench.pages.evidence import Evidence
from bench.pages.looks import CSS
from bench.pages.story import story
from bench.table import grid

_HERE = Path(__file__).parent
_TABLE = (
    "Speed-ups are against full_update in eager torch; ms / expected is a measured step over what "
    "its parts take when timed alone; probes are full steps that measure relevance."
)
_TRAINED = "Block 0 is next to the input; the blocks of the active set train, the others rest."
_RELEVANCE = (
    "How much each block still matters, as the schedule sees it: a running average of what the "
    "probes measured. Blocks that are all alike leave a schedule nothing to choose by."
)


def page(evidence: Evidence) -> str:
    """The page of one result file."""
    verdict, *reasons = words.headline(evidence)
    return _whole(
        f"blocksched: {evidence.name}",
        f"<header><p class='note'>{text(words.subject(evidence))}</p><h1>{text(verdict)}</h1>"
        f"{_lines(reasons)}</header>",
        _table([evidence]),
        _section("loss", "Loss", losses.validation([evidence]), losses.training([evidence])),
        _section("trained", "Which blocks trained", *_maps(evidence), intro=_TRAINED),
        _section("relevance", "Relevance", *_relevance(evidence), intro=_RELEVANCE),
        _section("time", "Where the time went", steps.step_times(evidence), steps.parts(evidence)),
        _section("memory-use", "Memory", steps.memory(evidence)),
        _settings(evidence),
        _limits(words.limits(evidence)),
    )


def comparison(evidences: Sequence[Evidence]) -> str:
    """The page of several result files side by side, what differs between them first.

    Files of the same name are told apart by a number.
    """
    names = ", ".join(each.name for each in evidences)
    limits = words.not_compared(evidences)
    limits += [f"{each.name}: {line}" for each in evidences for line in words.limits(each)]
    return _whole(
        f"blocksched: {names}",
        f"<header><p class='note'>{len(evidences)} results side by side</p>"
        f"<h1>{text(names)}</h1></header>",
        _differences(evidences),
        _table(evidences),
        _section("loss", "Loss", losses.validation(evidences), losses.training(evidences)),
        *(_one_of(i, each) for i, each in enumerate(evidences)),
        _limits(limits),
    )


def _whole(title: str, *parts: str) -> str:
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or the browser asks for one
        f"<title>{text(title)}</title>\n<style>\n{CSS}{style}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>\n{script}</script>\n</body></html>\n"
    )


def _section(name: str, title: str, *parts: str, intro: str = "") -> str:
    """A section of what there is to show; "" if there is nothing."""
    if not any(parts):
        return ""
    introduction = f"<p class='note'>{text(intro)}</p>" if intro else ""
    return f'<section id="{name}"><h2>{text(title)}</h2>{introduction}{"".join(parts)}</section>'


def _lines(lines: Sequence[str]) -> str:
    """A paragraph each; indented lines are the points of a list."""
    made = []
    for line in lines:
        points = line.startswith("  ")
        made.append(f"<p{' class=point' if points else ''}>{text(line.strip())}</p>")
    return "".join(made)


def _table(evidences: Sequence[Evidence]) -> str:
    """The benchmark's table, the file's name before each line if there are several."""
    made = []
    for each in evidences:
        if each.runs:
            head, *body = grid(each.content["results"], each.on_cpu)
            caption = f"<caption>{text(each.name)}</caption>" if len(evidences) > 1 else ""
            made.append(scrolling(_html_table(head, body, caption)))
    return _section("schedules", "The schedules", *made, intro=_TABLE)


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    def cells(kind: str, scope: str, line: Sequence[str]) -> str:
        name, *values = line
        return f"<tr><th scope='{scope}'>{text(name)}</th>" + "".join(
            f"<{kind} class='number'>{text(value)}</{kind}>" for value in values
        )

    rows = "".join(cells("td", "row", line) for line in body)
    return f"<table>{caption}<thead>{cells('th', 'col', head)}</thead><tbody>{rows}</tbody></table>"


def _maps(evidence: Evidence) -> list[str]:
    """A map of each schedule and its story; the story alone where all blocks always trained."""
    made = []
    for run in evidence.runs:
        told = " ".join(story(evidence, run))
        everything = {change.blocks for change in run.changes} == {tuple(range(evidence.n_blocks))}
        if everything and not run.probes:
            made.append(_lines([f"{run.name}: {told}"]))
        elif told:
            made.append(maps.block_map(evidence, run) + _lines([told]))
    return made


def _relevance(evidence: Evidence) -> list[str]:
    return [relevance.relevance(evidence, run) for run in evidence.runs]


def _settings(evidence: Evidence) -> str:
    again = f"<p>To run it again:</p><pre>{text(words.command(evidence))}</pre>"
    where = f"<h3>Machine, versions and data</h3>{_pairs(words.environment(evidence))}"
    flags = _pairs(words.settings(evidence))
    every = f"<details><summary>all settings</summary>{flags}</details>"
    return _section("settings", "Settings and environment", again, where, every)


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in pairs
    )
    return scrolling(f"<table class='words'><tbody>{rows}</tbody></table>")


def _limits(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return _section("limits", "What this evidence cannot say", f"<ul>{items}</ul>")


def _differences(evidences: Sequence[Evidence]) -> str:
    """What differs; below, on demand, what only some of the files tell."""
    found = words.differences(evidences)
    names = [each.name for each in evidences]
    both = [(name, values) for name, values in found if words.UNTOLD not in values]
    some = [(name, values) for name, values in found if words.UNTOLD in values]
    parts = [_columns(names, both) if both else "<p>Nothing: settings, machine and data agree.</p>"]
    if some:
        parts.append(f"<details><summary>told by some files only</summary>{_columns(names, some)}")
        parts.append("</details>")
    return _section("differences", "What differs", *parts)


def _columns(names: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A column a file."""
    head = "".join(f"<th scope='col'>{text(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th scope='row'>{text(name)}</th>"
        + "".join(f"<td>{text(value)}</td>" for value in values)
        + "</tr>"
        for name, values in lines
    )
    return scrolling(f"<table class='words'><thead><tr><td></td>{head}</tr></thead>{rows}</table>")


def _one_of(i: int, evidence: Evidence) -> str:
    """What a comparison says of one file alone: its verdict, and what its schedules froze."""
    moved = [run for run in evidence.runs if len(run.changes) > 1]
    shown = [maps.block_map(evidence, run) + relevance.relevance(evidence, run) for run in moved]
    return _section(f"file-{i}", evidence.name, _lines(words.headline(evidence)), *shown)
