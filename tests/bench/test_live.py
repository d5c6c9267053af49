"""The view of a running benchmark: what stands on the terminal, not the bytes that put it there."""

import io
import re
from types import SimpleNamespace

import pytest

import bench.runner
from bench.live import Live
from bench.run import main
from bench.train import StepRecord


class Screen(io.StringIO):
    """A small terminal: rows that wrap and scroll, the cursor up, lines and the rest cleared."""

    encoding = "utf-8"

    def __init__(self, monkeypatch, columns: int, rows: int = 40) -> None:
        super().__init__()
        self._setenv = monkeypatch.setenv
        self.rows, self.writes = [""], 0
        self.y = self.x = 0
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """Rows that no longer fit are broken, as terminals do."""
        self._setenv("COLUMNS", str(columns))
        self._setenv("LINES", str(rows))
        self.columns, self.height = columns, rows
        broken = [
            [r[i : i + columns] for i in range(0, len(r), columns)] or [""] for r in self.rows
        ]
        self.y = sum(map(len, broken[: self.y]))
        self.rows = [piece for pieces in broken for piece in pieces]

    def isatty(self) -> bool:
        return True

    def write(self, said: str) -> int:
        self.writes += 1
        for escape, letter in re.findall(r"\x1b\[(\d*[A-Z])|([^\x1b])", said):
            self._obey(escape) if escape else self._put(letter)
        return len(said)

    def _obey(self, escape: str) -> None:
        if escape.endswith("A"):
            top = max(0, len(self.rows) - self.height)
            self.y = max(top, self.y - int(escape[:-1]))
        elif escape in ("K", "J"):
            self.rows[self.y] = self.rows[self.y][: self.x]
            if escape == "J":
                self.rows[self.y + 1 :] = ["" for _ in self.rows[self.y + 1 :]]
        else:
            raise AssertionError(f"this terminal does not know {escape!r}")

    def _put(self, letter: str) -> None:
        if letter == "\r":
            self.x = 0
            return
        if letter == "\n" or self.x == self.columns:
            self.y, self.x = self.y + 1, 0
            self.rows += [""] * (self.y == len(self.rows))
        if letter != "\n":
            row = self.rows[self.y]
            self.rows[self.y] = row[: self.x] + letter + row[self.x + 1 :]
            self.x += 1

    @property
    def shown(self) -> list[str]:
        """Every row so far, those that have scrolled off included."""
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n").split("\n")


@pytest.fixture
def screen(monkeypatch):
    """Makes a terminal of so many columns and rows."""
    monkeypatch.delenv("TERM", raising=False)
    return lambda *size: Screen(monkeypatch, *size)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time that the view reads, moved by hand."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("bench.live.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def arm(name: str = "dynamic_suffix", steps: int = 30, active=(4, 5, 6, 7), running=None, **fields):
    """What the view reads of an arm: steps of 100 ms, losses that fall, a budget of 10 s."""
    made = SimpleNamespace(
        name=name,
        steps=[StepRecord(100.0, 5.0 - 0.1 * t, len(active), t % 10 == 9) for t in range(steps)],
        val_trace=[{"val_loss": 5.5}, {"val_loss": 4.25}],
        elapsed_ms=100.0 * steps,
        budget_ms=10_000.0,
        fraction=0.01 * steps,
        finished=False,
        failure=None,
        scheduler=SimpleNamespace(plan=SimpleNamespace(active=active, running=running)),
    )
    made.__dict__.update(fields)
    return made


def draw(stream, arms, n_blocks: int = 8, **more) -> None:
    Live(stream).update(arms, arms[-1], False, n_blocks, **more)


def test_what_stands_there(screen):
    terminal = screen(100)
    terminal.write("what was said before\n")
    draw(terminal, [arm("full_update", active=range(8), steps=3), arm()])
    assert terminal.shown == [
        "what was said before",
        "full_update     0:10 left  step     3    100.0 ms/step",
        "  val 4.2500 (-1.2500)  ████████   loss 4.8000  █▅▁",
        "dynamic_suffix  0:07 left  step    30    100.0 ms/step",
        "  val 4.2500 (-1.2500)  ░░░░████p  loss 2.1000  ████▇▇▇▆▆▆▅▅▅▅▄▄▄▃▃▃▂▂▂▁▁▁▁",
        "about 0:17 left in all  blocks, first to last: █ train  ░ frozen  p just measured",
    ]
    assert (terminal.y, terminal.x) == (6, 0)


def test_it_is_redrawn_in_place(screen, clock):
    terminal = screen(90)
    terminal.write("what was said before\n")
    live, moving, failing = Live(terminal), arm("full_update", steps=1), arm(steps=1)
    for steps in range(2, 60):
        for each in (moving, failing):
            each.steps.append(StepRecord(100.0, 4.0, 4, False))
        clock.now += 1.0
        live.update([moving, failing], moved=moving, validated=False, n_blocks=8)
        assert terminal.shown[0] == "what was said before"
        assert len(terminal.shown) == 6
        assert sum(f"step {steps:>5}" in line for line in terminal.shown) == 2
    failing.failure, failing.finished = "loss or gradients were not finite", True
    moving.finished = True
    live.update([moving, failing], moved=failing, validated=False, n_blocks=8)
    assert [line.split()[:2] for line in terminal.shown[1:]] == [
        *(["full_update", "done"], ["val", "4.2500"]),
        *(["dynamic_suffix", "stopped"], ["loss", "or"], ["about", "0:00"]),
    ]
    assert "░" not in "".join(terminal.shown[1:5])  # nothing trains any more


@pytest.mark.parametrize("columns", [1, 2, 10, 40, 79, 300])
@pytest.mark.parametrize("n_blocks", [1, 8, 100])
def test_no_line_is_broken(columns, n_blocks, screen):
    terminal = screen(columns)
    draw(terminal, [arm("full_update+fused"), arm(failure=80 * "why ", finished=True)], n_blocks)
    assert len(terminal.rows) == 6
    assert max(map(len, terminal.rows)) < max(columns, 2)


def test_forty_columns_keep_what_matters(screen):
    terminal = screen(40)
    draw(terminal, [arm("full_update+fused"), arm()])
    assert terminal.shown == [
        "full_update+fused  0:07 left",
        "  val 4.2500  ░░░░████p  ██▇▇▆▆▅▄▄▃▂▂▁▁",
        "dynamic_suffix     0:07 left",
        "  val 4.2500  ░░░░████p  ██▇▇▆▆▅▄▄▃▂▂▁▁",
        "about 0:14 left in all",
    ]


@pytest.mark.parametrize(
    "sizes", [[(100, 40), (40, 40), (33, 40), (100, 40)], [(60, 30), (30, 30)]]
)
def test_a_window_that_changes_its_width(sizes, screen, clock):
    terminal = screen(*sizes[0])
    terminal.write("before\n")
    live, arms = Live(terminal), [arm("full_update"), arm()]
    for size in sizes:
        terminal.resize(*size)
        clock.now += 1.0
        live.update(arms, moved=arms[0], validated=False, n_blocks=8)
        assert terminal.shown[0] == "before"
        assert sum(line.startswith("dynam") for line in terminal.shown) == 1
        assert len(terminal.shown) == 6


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_a_window_of_few_rows_does_not_fill_with_copies(rows, screen, clock):
    terminal = screen(80, rows)
    live, arms = Live(terminal), [arm(f"schedule {i}") for i in range(3)]
    for _ in range(5):
        clock.now += 1.0
        live.update(arms, moved=arms[0], validated=False, n_blocks=8)
    assert len(terminal.rows) <= rows
    assert terminal.shown[-1].startswith("about ")
    if rows >= 5:  # a line each
        assert [line[:10] for line in terminal.shown[:-1]] == [each.name for each in arms]


def test_at_most_five_drawings_a_second_and_the_last_one_always(screen, clock):
    terminal = screen(80)
    live, moving = Live(terminal), arm()
    for _ in range(1000):
        live.update([moving], moved=moving, validated=True, n_blocks=8)
        clock.now += 0.002
    assert 9 <= terminal.writes <= 11
    moving.finished = True
    live.update([moving], moved=moving, validated=True, n_blocks=8)
    assert "done" in terminal.shown[0]


@pytest.mark.parametrize(
    ("active", "n_blocks", "columns", "drawn"),
    [
        ((1, 4), 6, 100, "░█░░█░"),
        ((0,), 1, 100, "█"),
        ((0, 5), 6, 100, "█░░░░█"),
        (range(40, 80), 80, 200, 20 * "░" + 20 * "█"),
        (range(41, 80), 80, 200, 20 * "░" + "▒" + 19 * "█"),
        ((99, 100), 101, 200, 33 * "░" + "█"),  # three a character, two for the last
        (range(5, 18), 18, 41, "░░▒██████"),
    ],
)
def test_any_set_of_blocks_has_its_map(active, n_blocks, columns, drawn, screen):
    terminal = screen(columns)
    draw(terminal, [arm(active=tuple(active))], n_blocks)
    assert f"  {drawn}p  " in terminal.shown[1]
    if "▒" in drawn and columns > 100:
        assert "each 2 blocks, first to last: █ train  ░ frozen  ▒ in part" in terminal.shown[2]


def test_blocks_that_do_not_run_have_their_own_sign(screen):
    terminal = screen(120)
    growing = arm("grow", active=(0, 2), running=(0, 1, 2))
    draw(terminal, [arm("full_update", active=range(8)), growing])
    assert "  ████████p  " in terminal.shown[1]
    assert "  █░█·····p  " in terminal.shown[3]
    assert "░ frozen  · not running  p just measured" in terminal.shown[4]


@pytest.mark.parametrize("count", [2, 512, 513, 100_000])
def test_a_curve_of_a_long_run_is_as_quick(count, screen):
    terminal = screen(120)
    draw(terminal, [arm(steps=count)])
    curve = terminal.shown[1].split()[-1]
    assert curve[0] == "█"
    assert curve[-1] == "▁"
    assert len(curve) <= 40


def test_the_time_left_in_all(screen, clock):
    """Of those that run and those that wait, with what validations take beside the steps."""
    terminal = screen(100)
    live, moving = Live(terminal), arm(steps=10)
    for _ in range(2):
        live.update([moving], moved=moving, validated=False, n_blocks=8, waiting=2)
        assert terminal.shown[-1].startswith("about 0:29 left in all")
    clock.now += 3.0  # of which one was steps
    moving.elapsed_ms += 1000.0
    live.update([moving], moved=moving, validated=False, n_blocks=8, waiting=2)
    assert terminal.shown[-1].startswith("about 1:24 left in all")  # three times 8 + 2 x 10 s
    assert "0:08 left" in terminal.shown[0]  # its own, of steps


def test_the_time_left_of_a_number_of_steps(screen):
    terminal = screen(100)
    draw(terminal, [arm(steps=20, budget_ms=None, fraction=0.001)])
    assert "33:18 left" in terminal.shown[0]
    draw(terminal, [arm(steps=20, budget_ms=None, fraction=0.0001)])
    assert "5:33:18 left" in terminal.shown[-3]


@pytest.mark.parametrize("why", ["piped", "dumb"])
def test_plain_lines_elsewhere(why, screen, monkeypatch):
    stream = io.StringIO() if why == "piped" else screen(20)
    monkeypatch.setenv("TERM", "dumb" if why == "dumb" else "xterm")
    live, moving = Live(stream), arm(name="static_suffix")
    live.update([moving], moved=moving, validated=False, n_blocks=8)
    live.update([moving], moved=moving, validated=True, n_blocks=8)
    moving.finished, moving.failure = True, "not finite"
    live.update([moving], moved=moving, validated=False, n_blocks=8)
    said = stream.getvalue() if why == "piped" else "".join(stream.rows)
    line = "static_suffix     step    30  loss 2.1000  val 4.2500  active  4/8    100.0 ms/step  "
    assert said.replace("\n", "") == f"{line}0:07 left{line}stopped: not finite"
    assert "\x1b" not in said


def test_only_ascii_where_the_encoding_has_no_more(screen):
    terminal = screen(100)
    terminal.encoding = "ascii"
    draw(terminal, [arm()])
    assert "....####p" in terminal.shown[1]
    assert terminal.shown[1].endswith("  777766655544443332221110000")
    assert "".join(terminal.shown).isascii()


@pytest.mark.parametrize("interleave", [True, False])
def test_a_whole_run(interleave, tiny, tmp_path, screen, monkeypatch, capsys):
    terminal = screen(100)
    monkeypatch.setattr(bench.runner, "Live", lambda: Live(terminal))
    names = ["full_update", "static_suffix", "dynamic_suffix"]
    flags = ["--preset", "small", "--schedules", ",".join(names), "--json-out"]
    flags += [str(tmp_path / "r.json"), "--interleave" if interleave else "--no-interleave"]
    assert main([*tiny, *flags]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert [line.split()[:2] for line in terminal.shown[0:6:2]] == [
        [name, "done"] for name in names
    ]
    assert terminal.shown[6].startswith("about 0:00 left in all")
    assert len(terminal.shown) == 7
