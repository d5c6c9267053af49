"""Compare arms over tasks and seeds, with statistics: `python bench/study.py STUDY.toml`.

bench/trials/design.py says what a study file holds, bench/studies has some. Stop it whenever you
like: what has ended is not run again. Exit status: 0 done; 2 bad input, or a file that cannot be
written; 130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.config import UserError
from bench.provenance import uncommitted
from bench.report import write_study_page
from bench.runner import Terminated, Termination
from bench.trials.arms import CLOCKS, Study
from bench.trials.cells import Cells
from bench.trials.design import load
from bench.trials.files import keep
from bench.trials.inference import scipy_stats
from bench.trials.result import document
from bench.trials.summary import lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of a study, write its result, and return the exit status."""
    given = _parser().parse_args(argv)
    previous = signal.signal(signal.SIGTERM, Termination())
    try:
        _run(given)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("\nInterrupted; the same command goes on.", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _run(given: argparse.Namespace) -> None:
    study = load(Path(given.study), given.clock)
    if study.confirms:
        _require_committed(study.path)
    scipy_stats()  # or it would be missed when all has run
    folder = Path(given.out or Path("results") / study.name)
    cells = Cells(study, folder)
    target = folder / f"{study.name}.json"
    try:
        cells.run()
    except KeyboardInterrupt:
        _conclude(study, cells, target)
        raise
    _conclude(study, cells, target)


def _conclude(study: Study, cells: Cells, path: Path) -> None:
    """Write the result and its page, and print what it says."""
    prices = cells.prices.content if study.clock == "cost" else None
    result = document(study, cells.done, prices)
    keep(path, result)
    print("\n" + "\n".join(lines(result)))
    print(f"\nResult file: {path}\nAs a page: {write_study_page(path)}")


def _require_committed(path: Path) -> None:
    """What is judged, and how, stands before its seeds run."""
    found = uncommitted(path)
    if found is None or found:
        changed = "git does not know them" if found is None else f"not yet: {', '.join(found)}"
        raise UserError(
            f"{path} is a confirmation, so that it and the code have to be committed before it "
            f"runs ({changed}): commit them, or drop `confirms` for a search"
        )


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="bench/study.py", description=__doc__.partition("\n")[0])
    made.add_argument("study", metavar="STUDY.toml")
    made.add_argument("--clock", choices=CLOCKS, help="instead of the one that the file says")
    made.add_argument("--out", metavar="DIR", help="where cells and result go (results/STUDY)")
    return made


if __name__ == "__main__":
    sys.exit(main())
