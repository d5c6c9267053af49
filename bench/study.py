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
from bench.runner import Terminated, Termination
from bench.trials.cells import Cells
from bench.trials.design import CLOCKS, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of a study, write its result, and return the exit status."""
    given = _parser().parse_args(argv)
    previous = signal.signal(signal.SIGTERM, Termination())
    try:
        study = load(Path(given.study), given.clock)
        if study.confirms:
            _require_committed(study.path)
        cells = Cells(study, Path(given.out or Path("results") / study.name))
        cells.run()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("\nInterrupted; the same command goes on.", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


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
