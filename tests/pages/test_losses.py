"""Loss figures: what is drawn and said is what the file says, in ordinary runs and at the edges."""

import html
import json
import re
from pathlib import Path

import pytest

from bench.pages import losses
from bench.pages.curves import MOST, clock, loss_text
from bench.pages.evidence import Evidence, evidence, load
from tests.pages.cases import CORNERS, RECORDING, result

TEXT = Path(__file__).parents[2] / "bench" / "results" / "cpu-small-text.json"
FINETUNE = TEXT.with_name("cpu-small-finetune.json")


def of(case: str) -> Evidence:
    return evidence(CORNERS[case](), case)


def values(figure: str) -> dict:
    """What a figure says on hover, and where."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])


def said(figure: str) -> dict[str, list[str]]:
    return {each["name"]: each["texts"] for each in values(figure)["series"]}


def svg(figure: str, kind: str = "wide") -> str:
    return re.search(rf'<svg class="{kind}".*?</svg>(?=<svg class="narrow"|<div)', figure)[0]


def numbers(figure: str) -> list[float]:
    """What stands at the vertical axis."""
    found = re.findall(r'class="tick"[^>]*text-anchor="end">([^<]+)', svg(figure))
    return [float(one.replace(",", "")) for one in found]


def test_every_validation_is_said_as_in_the_file():
    made = load(TEXT)
    expected = {
        run.name: [f"{v.ms / 1e3:.1f} s, step {v.step}: {v.loss:.4f}" for v in run.validations]
        for run in made.runs
    }
    assert said(losses.validation([made])) == expected
    last = json.loads(TEXT.read_bytes())["traces"]["dynamic_suffix"]["val_trace"][-1]
    ends = f"{last['elapsed_ms'] / 1e3:.1f} s, step {last['step']}: {last['val_loss']:.4f}"
    assert expected["dynamic_suffix"][-1] == ends


def test_hover_and_keys_in_the_browser(open_page, whole):
    made = load(TEXT)
    page = open_page(whole(losses.validation([made]) + losses.training([made])))
    run = made.runs[3]
    validation, training = page.locator("figure").all()
    plot = validation.locator("svg.wide")
    box = plot.bounding_box()
    scale = box["width"] / 880
    positions = values(losses.validation([made]))["wide"][3]
    for i, v in enumerate(run.validations[1:], 1):
        page.mouse.move(
            box["x"] + positions[2 * i] * scale + 2, box["y"] + positions[2 * i + 1] * scale
        )
        expected = f"{run.name}, {v.ms / 1e3:.1f} s, step {v.step}: {v.loss:.4f}"
        assert validation.locator(".tip").text_content() == expected
        assert validation.locator(".said").text_content() == expected
    training.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    first = made.runs[0]
    average = (first.losses[0] + first.losses[1]) / 2
    assert training.locator(".said").text_content() == (
        f"full_update, {sum(first.step_ms[:2]) / 1e3:.1f} s, step 1: {first.losses[1]:.4f} "
        f"(average {average:.4f})"
    )


def test_curves_go_through_what_is_said():
    figure = losses.validation([load(TEXT)])
    for kind in ("wide", "narrow"):
        lines = re.findall(r'<path class="line"[^>]* d="(M[^"]*L[^"]*)"', svg(figure, kind))
        assert len(lines) == 5
        for line, places in zip(lines, values(figure)[kind], strict=True):
            drawn = [tuple(map(float, p.split())) for p in line[1:].split("L")]
            assert drawn[1:] == list(zip(places[2::2], places[3::2], strict=True))


def test_axes_have_units():
    figure = losses.validation([load(TEXT)])
    assert "time in steps, seconds</text>" in figure
    assert "validation loss, nats per byte</text>" in figure
    figure = losses.training([load(RECORDING)])
    assert "training loss, mean squared error</text>" in figure


def test_the_end_can_be_read():
    """The first losses, 5.5, lie above the axis: at its end, with an arrow and a word."""
    figure = losses.validation([load(TEXT)])
    assert numbers(figure)[0] <= 1.8
    assert 2.2 <= numbers(figure)[-1] <= 2.5
    assert "highest losses, up to 5.5427," in figure
    assert all(places[1] == 30.0 for places in values(figure)["wide"])
    assert svg(figure).count("v-10m-3.5 4l3.5-4l3.5 4") == 5
    assert "5.5427" in said(figure)["full_update"][0]
    for drawn in (svg(figure), svg(losses.training([load(TEXT)]))):
        markers = " ".join(re.findall(r'class="mark"[^>]* d="([^"]+)', drawn))
        heights = [float(y) for y in re.findall(r"M[\d.-]+ ([\d.-]+)m", markers)]
        assert len(heights) > 5 * 7
        assert min(heights) >= 30.0


def test_what_is_to_beat_and_where_equal_time_ends():
    made = load(TEXT)
    for kind in ("wide", "narrow"):
        drawn = svg(losses.validation([made]), kind)
        for name in ("full_update", "full_update+fused"):
            row = next(run.row for run in made.runs if run.name == name)
            assert f"{name} ends at {row['final_val_loss']:.4f}</text>" in drawn
        assert f"equal time ends: {made.budget_ms / 1e3:.1f} s</text>" in drawn
    content = result()
    content["config"] |= {"equal_time_budget": False, "time_budget_ms": None}
    assert "equal time" not in losses.validation([evidence(content, "steps")])


def test_training_is_the_real_losses_with_an_average():
    made = load(TEXT)
    for run in made.runs:
        texts = said(losses.training([made]))[run.name]
        window = len(run.losses) // 20
        for one in texts:
            found = re.fullmatch(r"([\d.]+) s, step (\d+): ([\d.]+) \(average ([\d.]+)\)", one)
            i = int(found[2])
            recent = run.losses[max(0, i + 1 - window) : i + 1]
            assert found[1] == f"{sum(run.step_ms[: i + 1]) / 1e3:.1f}"
            assert found[3] == f"{run.losses[i]:.4f}"
            assert float(found[4]) == pytest.approx(sum(recent) / len(recent), abs=6e-5)
        assert len(texts) == min(MOST, len(run.losses)) or len(run.losses) > MOST >= len(texts)


def test_the_original_experiment_has_a_marker_each():
    figure = losses.validation([load(RECORDING)])
    assert said(figure) == {
        "full_update": ["76.0 s, step 1050: 0.0983"],
        "static_suffix": ["76.0 s, step 1972: 0.2487"],
        "dynamic_suffix": ["76.1 s, step 1206: 0.1117"],
    }
    assert svg(figure).count('class="mark"') == 3
    assert "only the loss at the end was recorded" in figure


def test_several_files_share_an_axis_where_they_share_a_unit():
    files = [load(TEXT), load(FINETUNE), load(RECORDING)]
    figures = losses.validation(files) + losses.training(files)
    assert re.findall(r'<figure class="chart" id="([^"]+)"', figures) == [
        *("validation-loss", "validation-loss-2", "training-loss", "training-loss-2"),
    ]
    both, alone = re.findall("<figure.*?</figure>", losses.validation(files), re.DOTALL)
    names = re.findall(r"</svg>([^<]+)</li>", both)
    assert "static_suffix, cpu-small-text" in names
    assert "static_suffix, cpu-small-finetune" in names
    assert list(said(both)) == names
    assert "recording" not in both
    assert "mean squared error" in alone
    after = [json.loads(file.read_bytes())["config"]["time_budget_ms"] for file in (TEXT, FINETUNE)]
    text, finetune = (f"{ms / 1e3:.1f} s" for ms in after)
    assert f"of cpu-small-text after {text}, of cpu-small-finetune after {finetune}" in both
    line = r'class="line" style="stroke:var\(--(c\d)\)"(?: stroke-dasharray="([^"]*)")? d="M[^v]*"'
    by_colour: dict[str, set[str]] = {}
    for colour, dash in re.findall(line, svg(both)):
        by_colour.setdefault(colour, set()).add(dash)
    assert {len(dashes) for dashes in by_colour.values()} == {2}  # colour a schedule, dash a file


@pytest.mark.parametrize("case", CORNERS)
def test_corners(case):
    made = of(case)
    figures = losses.validation([made]) + losses.training([made])
    assert not re.search(r"\bnan\b|\binf\b|NaN|None", figures)
    assert (figures == "") == (case == "no schedule yet")


def test_losses_that_were_not_finite():
    made = of("nulls")
    figure, run = losses.validation([made]), made.runs[2]
    crosses = svg(figure).count("l8 8m0-8l-8 8")
    assert crosses == sum(v.loss is None for v in run.validations) > 0
    assert said(figure)["dynamic_suffix"][-1].endswith("not finite")
    assert "Crosses: the loss was not finite there." in figure
    assert "Crosses" not in losses.validation([of("ordinary")])
    training = losses.training([made])
    assert "step 30: not finite" in said(training)["dynamic_suffix"][30]
    assert svg(training).count("l8 8m0-8l-8 8") == 20


def test_without_a_finite_loss_the_axis_has_no_numbers():
    figure = losses.validation([of("all null")])
    assert numbers(figure) == []
    assert all(text.endswith("not finite") for texts in said(figure).values() for text in texts)


def test_what_diverges_does_not_flatten_the_others():
    content = result()
    trace = content["traces"]["dynamic_suffix"]
    for point in trace["val_trace"][5:]:
        point["val_loss"] = 1e30
    figure = losses.validation([evidence(content, "diverged")])
    assert numbers(figure)[-1] < 10
    assert "1.000e+30" in said(figure)["dynamic_suffix"][-1]
    assert max(map(len, re.findall(r"-?[\d.]+", svg(figure)))) < 20


def test_schedules_names_are_escaped():
    made = of("markup")
    figures = losses.validation([made]) + losses.training([made])
    without_values = re.sub(r"<script type.*?</script>", "", figures)
    assert "<script" not in without_values
    assert all(html.escape(run.name) in without_values for run in made.runs)
    assert list(said(figures)) == [run.name for run in made.runs]


def test_a_long_run_stays_small():
    made = evidence(result(8_000, 4, ("full_update", "dynamic_suffix")), "long")
    figure = losses.training([made])
    assert len(figure) < 2 * 60_000
    for run in made.runs:
        peak = f"step {run.losses.index(max(run.losses))}: {max(run.losses):.4f}"
        assert any(peak in one for one in said(figure)[run.name])


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (42.0, "0.042 s"),
        (41_851.9, "41.9 s"),
        (1_800_000.0, "30.00 min"),
        (36_000_000.0, "10.000 h"),
    ],
)
def test_times_are_said_in_a_unit_that_suits(ms, expected):
    assert clock(ms).say(ms) == expected


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(1.75701, "1.7570"), (0.0, "0.0000"), (3e-6, "3.000e-06"), (1e30, "1.000e+30"),
     (-2.0, "-2.0000"), (None, "not finite")],
)  # fmt: skip
def test_losses_are_said_with_enough_digits(loss, expected):
    assert loss_text(loss) == expected
