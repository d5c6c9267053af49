"""What all pages are made of: the frame, sections, paragraphs and tables, as HTML."""

from collections.abc import Sequence
from pathlib import Path

from bench.pages.chart import scrolling, text
from bench.pages.looks import CSS

_HERE = Path(__file__).parent


def whole(title: str, *parts: str) -> str:
    """A page: its title as plain text, its parts as HTML."""
    style, script = ((_HERE / name).read_text() for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or the browser asks for one
        f"<title>{text(title)}</title>\n<style>\n{CSS}{style}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>\n{script}</script>\n</body></html>\n"
    )


def section(name: str, title: str, *parts: str, intro: str = "") -> str:
    """A section of what there is to show; "" if there is nothing."""
    if not any(parts):
        return ""
    introduction = f"<p class='note'>{text(intro)}</p>" if intro else ""
    return f'<section id="{name}"><h2>{text(title)}</h2>{introduction}{"".join(parts)}</section>'


def paragraphs(lines: Sequence[str]) -> str:
    """A paragraph each; indented lines are the points of a list."""
    made = []
    for line in lines:
        points = line.startswith("  ")
        made.append(f"<p{' class=point' if points else ''}>{text(line.strip())}</p>")
    return "".join(made)


def html_table(head: Sequence[str], body: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of plain texts, numbers to the right of a name; `caption` is HTML."""

    def cells(kind: str, scope: str, line: Sequence[str]) -> str:
        name, *values = line
        return f"<tr><th scope='{scope}'>{text(name)}</th>" + "".join(
            f"<{kind} class='number'>{text(value)}</{kind}>" for value in values
        )

    rows = "".join(cells("td", "row", line) for line in body)
    return f"<table>{caption}<thead>{cells('th', 'col', head)}</thead><tbody>{rows}</tbody></table>"


def pairs(lines: Sequence[tuple[str, str]]) -> str:
    """A table of names, each with its value."""
    rows = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in lines
    )
    return scrolling(f"<table class='words'><tbody>{rows}</tbody></table>")


def limits_section(lines: Sequence[str]) -> str:
    """The section of what the evidence cannot say, a point a line."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return section("limits", "What this evidence cannot say", f"<ul>{items}</ul>")
