"""Show results: `python bench/report.py FILE...` writes a page and prints a summary.

Of one file the page lies beside it; of several it sets them side by side. A study's result has a
page of its own. Exit status: 0 done; 2 a file that is no result, or a page that cannot be written.
"""

import argparse
import collections
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.config import UserError
from bench.pages.evidence import Evidence, load
from bench.pages.page import comparison, page
from bench.pages.paper import draw
from bench.pages.study import is_study, load_study, study_page
from bench.pages.terminal import printable, summary
from bench.results import read, write_whole
from bench.trials.summary import lines


def main(argv: Sequence[str] | None = None) -> int:
    """Read every file, then write, and return the exit status."""
    given = _parser().parse_args(argv)
    paths = [Path(name) for name in given.files]
    target = Path(given.html) if given.html else beside(paths)
    try:
        contents = [read(path) for path in paths]
        if any(is_study(content) for content in contents):
            said, written = _study(paths, target, given.png)
        else:
            said, written = _results(paths, target, given.png)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    print("\n".join([*said, *(f"Written: {path}" for path in written)]))
    return 0


def write_study_page(path: Path, target: Path | None = None) -> Path:
    """Write the page of a study's result, beside it unless `target` is given, and return its path.

    Raises UserError if the file is no study's result, or the page cannot be written.
    """
    page_path = target or beside([path])
    check_target(page_path, [path])
    return _write(study_page(load_study(path)), page_path)


def beside(paths: Sequence[Path]) -> Path:
    """Where the page of these files goes by default."""
    first = paths[0]
    if len(paths) > 1:
        return first.with_name("comparison.html")
    return first.with_suffix(".html") if first.suffix == ".json" else Path(f"{first}.html")


def check_target(target: Path, sources: Sequence[Path]) -> None:
    """Raises UserError if the page of `sources` cannot be `target`."""
    if any(target.resolve() == source.resolve() for source in sources):
        raise UserError(f"the page would replace the result file {target}: choose another --html")
    if target.exists() and not target.is_file():
        raise UserError(f"the page cannot be {target}, which is no plain file: choose another")


def write_page(evidences: Sequence[Evidence], target: Path) -> Path:
    """Write the page whole or not at all. Raises UserError if it cannot be written."""
    return _write(page(evidences[0]) if len(evidences) == 1 else comparison(evidences), target)


def _study(paths: Sequence[Path], target: Path, png: str | None) -> tuple[list[str], list[Path]]:
    """What is said of a study, and the files that were written."""
    if len(paths) > 1:
        raise UserError("a study's result has a page of its own: give that file alone")
    if png:
        raise UserError("--png draws results of bench/run.py, and this is a study's: leave it out")
    content = load_study(paths[0])
    return [*map(printable, lines(content)), ""], [write_study_page(paths[0], target)]


def _results(paths: Sequence[Path], target: Path, png: str | None) -> tuple[list[str], list[Path]]:
    """What is said of results of bench/run.py, and the files that were written."""
    evidences = _apart([load(path) for path in paths])
    check_target(target, paths)
    written = [write_page(evidences, target)]
    if png:
        written += draw(evidences, Path(png))
    return [line for evidence in evidences for line in [*summary(evidence), ""]], written


def _write(content: str, target: Path) -> Path:
    try:
        write_whole(target, content.encode())
    except OSError as error:
        raise UserError(
            f"the page {target} cannot be written ({error.strerror}): choose another place"
        ) from None
    return target


def _apart(evidences: Sequence[Evidence]) -> list[Evidence]:
    """Files of one name get numbers."""
    seen: collections.Counter[str] = collections.Counter()
    made = []
    for each in evidences:
        seen[each.name] += 1
        again = seen[each.name]
        name = each.name if again == 1 else f"{each.name} ({again})"
        made.append(dataclasses.replace(each, name=name))
    return made


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench/report.py",
        description="Show results of bench/run.py, of bench/study.py or of the original "
        "experiment: a page that needs no other file, and a summary here. Several files are set "
        "side by side; a study's stands alone.",
    )
    made.add_argument("files", nargs="+", metavar="FILE", help="a result file")
    made.add_argument(
        "--html", metavar="PATH", help="the page (beside the file; of several: comparison.html)"
    )
    made.add_argument("--png", metavar="DIR", help="also write the main plots, as for a paper")
    return made


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    sys.exit(main())
