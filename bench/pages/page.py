"""The page of a result, and of several side by side: one file that needs no other."""

from collections.abc import Sequence

from bench.pages import losses, maps, relevance, steps, words
from bench.pages.chart import scrolling, text
from bench.pages.evidence import Evidence
from bench.pages.sections import html_table, limits_section, pairs, paragraphs, section, whole
from bench.pages.story import story
from bench.table import grid

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
    return whole(
        f"blocksched: {evidence.name}",
        f"<header><p class='note'>{text(words.subject(evidence))}</p><h1>{text(verdict)}</h1>"
        f"{paragraphs(reasons)}</header>",
        _table([evidence]),
        section("loss", "Loss", losses.validation([evidence]), losses.training([evidence])),
        section("trained", "Which blocks trained", *_maps(evidence), intro=_TRAINED),
        section("relevance", "Relevance", *_relevance(evidence), intro=_RELEVANCE),
        section("time", "Where the time went", steps.step_times(evidence), steps.parts(evidence)),
        section("memory-use", "Memory", steps.memory(evidence)),
        _settings(evidence),
        limits_section(words.limits(evidence)),
    )


def comparison(evidences: Sequence[Evidence]) -> str:
    """The page of several result files side by side, what differs between them first.

    Files of the same name are told apart by a number.
    """
    names = ", ".join(each.name for each in evidences)
    limits = words.not_compared(evidences)
    limits += [f"{each.name}: {line}" for each in evidences for line in words.limits(each)]
    return whole(
        f"blocksched: {names}",
        f"<header><p class='note'>{len(evidences)} results side by side</p>"
        f"<h1>{text(names)}</h1></header>",
        _differences(evidences),
        _table(evidences),
        section("loss", "Loss", losses.validation(evidences), losses.training(evidences)),
        *(_one_of(i, each) for i, each in enumerate(evidences)),
        limits_section(limits),
    )


def _table(evidences: Sequence[Evidence]) -> str:
    """The benchmark's table, the file's name before each line if there are several."""
    made = []
    for each in evidences:
        if each.runs:
            head, *body = grid(each.content["results"], each.on_cpu)
            caption = f"<caption>{text(each.name)}</caption>" if len(evidences) > 1 else ""
            made.append(scrolling(html_table(head, body, caption)))
    return section("schedules", "The schedules", *made, intro=_TABLE)


def _maps(evidence: Evidence) -> list[str]:
    """A map of each schedule and its story; the story alone where all blocks always trained."""
    made = []
    for run in evidence.runs:
        told = " ".join(story(evidence, run))
        everything = {change.blocks for change in run.changes} == {tuple(range(evidence.n_blocks))}
        if everything and not run.probes:
            made.append(paragraphs([f"{run.name}: {told}"]))
        elif told:
            made.append(maps.block_map(evidence, run) + paragraphs([told]))
    return made


def _relevance(evidence: Evidence) -> list[str]:
    return [relevance.relevance(evidence, run) for run in evidence.runs]


def _settings(evidence: Evidence) -> str:
    again = f"<p>To run it again:</p><pre>{text(words.command(evidence))}</pre>"
    where = f"<h3>Machine, versions and data</h3>{pairs(words.environment(evidence))}"
    flags = pairs(words.settings(evidence))
    every = f"<details><summary>all settings</summary>{flags}</details>"
    return section("settings", "Settings and environment", again, where, every)


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
    return section("differences", "What differs", *parts)


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
    return section(f"file-{i}", evidence.name, paragraphs(words.headline(evidence)), *shown)
