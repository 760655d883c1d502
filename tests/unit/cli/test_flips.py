"""`poprisk flips`: which row is which pair, what is changed, and what files and picture hold.

What it prints and refuses by its options is in tests/goldens/cli/flips.txt.
"""

import datetime
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value, load_dataset
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.flips.picture import draw_flips
from poprisk_integrations.cli.flips.show import print_pairs
from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.output import say
from poprisk_integrations.cli.preference_data import load_preferences
from poprisk_integrations.core.calibration import reliability
from poprisk_integrations.trl import FlipReport
from poprisk_integrations.trl.pairs import excerpts, pair_texts

P = [0.2, 0.95, math.nan, 0.5, 0.35, 0.9]
ALL = range(len(P))
ROWS: list[dict[str, Any]] = [
    {"key": f"k{i}", "prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "n": i or None}
    for i in ALL
]


def turned(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def report(p: list[float] = P, **changes: Any) -> FlipReport:
    columns = {
        "pair_id": range(len(p)), "row": range(len(p)), "probability_wrong": p,
        "margin": [-x for x in p], "step": [-1 if x != x else 0 for x in p], **changes,
    }  # fmt: skip
    return FlipReport(**columns)


@pytest.fixture
def flips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs the command on a report and data; its JSON with the rows it wrote, or its complaint."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("poprisk_integrations.cli.output.find_spec", lambda name: None)  # slow
    monkeypatch.chdir(tmp_path)

    def run(found: FlipReport, data: Any = None, *options: str, out: str = "out.jsonl") -> Any:
        found.save("run")
        if data is not None:
            dataset = data if isinstance(data, Dataset) else Dataset.from_list(data)
            dataset.to_parquet("data.parquet")
            options = ("--dataset", "data.parquet", "--write", out, "--force", *options)
        capsys.readouterr()
        status = main(["flips", "run", *options, "--json"])
        captured = capsys.readouterr()
        if status:
            assert captured.out == ""
            (line,) = [x for x in captured.err.splitlines() if x.startswith("poprisk: ")]
            return line
        result = json.loads(captured.out)
        if data is not None:
            kind = {".jsonl": "json"}.get(Path(out).suffix, Path(out).suffix[1:])
            result["rows"] = load_dataset(kind, data_files=out, split="train").to_list()
        return result

    return run


MODES: dict[tuple[str, ...], tuple[set[int], set[int]]] = {  # dropped, swapped
    (): ({1, 3, 5}, set()),
    ("--min-probability", "0"): ({0, 1, 3, 4, 5}, set()),
    ("--min-probability", "1"): (set(), set()),
    ("--min-probability", "0.9", "--mode", "swap"): (set(), {1, 5}),
    ("--mode", "suggested"): ({3}, {1, 5}),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("options", MODES, ids="-".join)
def test_cleaned_data(flips: Any, options: tuple[str, ...], suffix: str) -> None:
    dropped, swapped = MODES[options]
    rows = [{**row, "n": i + 2**60} for i, row in enumerate(ROWS)]
    found = flips(report(), rows, *options, out=f"out{suffix}")
    changed = [turned(row) if i in swapped else row for i, row in enumerate(rows)]
    assert found["rows"] == [row for i, row in enumerate(changed) if i not in dropped]
    written = found["written"]
    assert (written["dropped"], written["swapped"]) == (len(dropped), len(swapped))
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == [
        "data.parquet",
        f"out{suffix}",
    ]


def test_a_report_edited_by_hand_decides(flips: Any) -> None:
    edited = report(action=["swap", "keep", "drop", "review", "too_long", "unseen"])
    found = flips(edited, ROWS, "--mode", "suggested")
    assert found["rows"] == [turned(ROWS[0]), ROWS[1], *ROWS[3:]]


def test_the_command_that_it_proposes_works(flips: Any, capsys: Any) -> None:
    Dataset.from_list(ROWS).to_json("data.jsonl")
    report().save("run")
    assert main(["flips", "run", "--dataset", "data.jsonl"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Next: ")]
    program, *command = line.split("`")[1].split()
    assert program == "poprisk"
    assert main([*command, "--quiet"]) == 0
    assert len(Path("cleaned.jsonl").read_text().splitlines()) == 3


# Which row is which pair.


@pytest.mark.parametrize(
    ("ids", "order"),
    [([f"k{i}" for i in ALL], [3, 0, 5, 1, 4, 2]), ([int(i) for i in ALL], [*ALL])],
    ids=["text", "numbers beside text"],
)
def test_ids_are_looked_up(flips: Any, ids: list[Any], order: list[int]) -> None:
    rows = [{**ROWS[i], "key": str(ids[i])} for i in order]
    found = flips(report(pair_id=ids), [*rows, {**ROWS[0], "key": "99"}], "--id-column", "key")
    assert [pair["prompt"] for pair in found["top"]] == ["p1", "p5", "p3", "p4", "p0"]
    assert found["rows"] == [row for row in rows if row["prompt"] in ("p0", "p2", "p4")] + [
        {**ROWS[0], "key": "99"}
    ]


def gaps(rows: list[int], data: list[dict[str, Any]], texts: int = 2) -> FlipReport:
    """A report of some rows of the data, with the first words of the first of them."""
    known = {row: excerpts(data[row]) for row in rows[:texts]}
    return report([1 - 0.1 * i for i in range(len(rows))], pair_id=rows, row=rows, texts=known)


@pytest.mark.parametrize("data", [ROWS, [turned(row) for row in ROWS]], ids=["as are", "swapped"])
def test_rows_dropped_before_training_are_known_by_their_texts(flips: Any, data: Any) -> None:
    """Rows 0 and 3 were left out, the others kept their numbers; swaps were made afterwards."""
    found = flips(gaps([1, 2, 4, 5], ROWS), data, "--min-probability", "0.95")
    assert found["rows"] == [row for i, row in enumerate(data) if i != 1]


OTHER_DATA: dict[str, tuple[FlipReport, Any, list[str]]] = {  # more in the transcript
    "report is of 6 pairs, --dataset has 7": (report(), [*ROWS, ROWS[0]], []),
    "have ids of their own": (report(pair_id=[5, 4, 3, 2, 1, 0]), ROWS, []),
    "6 of the report's 6 pairs (such as 'b') are not in column 'key'": (
        *(report(pair_id=list("abcdef")), ROWS, ["--id-column", "key"]),
    ),
    "(such as 'None') are not in": (  # a missing id is not the text "None"
        report(pair_id=["None", *"abcde"]),
        [{**row, "key": key} for row, key in zip(ROWS, [None, *"abcde"], strict=True)],
        ["--id-column", "key"],
    ),
    "'k0' occurs twice in 'key'": (report(), [ROWS[0], *ROWS], ["--id-column", "key"]),
    "has other texts than the flip report ('c1'": (gaps([1, 2, 4, 5], ROWS), ROWS[::-1], []),
    "has other texts than": (gaps([*ALL], ROWS), [ROWS[1], ROWS[0], *ROWS[2:]], []),
    "report is of 2 pairs, --dataset has 6": (gaps([1, 4], ROWS, texts=0), ROWS, []),
    "same split, order and number of rows": (gaps([0, 9], [*ROWS] * 2, texts=0), ROWS[:2], []),
}


@pytest.mark.parametrize("message", OTHER_DATA)
def test_a_report_of_other_data_is_refused(flips: Any, message: str) -> None:
    found, data, options = OTHER_DATA[message]
    assert message in flips(found, data, *options)
    assert not Path("out.jsonl").exists()


# What the files hold.


def test_a_swap_touches_nothing_else(flips: Any) -> None:
    extra = {"ref_chosen_logps": 1.0, "score_chosen": 5, "ref_rejected_logps": 2.0}
    rows = [row | extra for row in ROWS]
    found = flips(report(), rows, "--mode", "swap", "--min-probability", "0.9")
    changed = {"ref_chosen_logps": 2.0, "ref_rejected_logps": 1.0}
    assert found["rows"] == [turned(r) | changed if i in (1, 5) else r for i, r in enumerate(rows)]
    assert found["written"]["columns_not_swapped"] == ["score_chosen"]
    assert [type(row["n"]) for row in found["rows"]] == [type(row["n"]) for row in rows]


def test_conversations_and_long_texts_are_swapped(flips: Any) -> None:
    talks = [[{"role": "assistant", "content": f"{side}{i}"} for i in ALL] for side in "cr"]
    rows = [{"chosen": [a], "rejected": [b]} for a, b in zip(*talks, strict=True)]
    swap = ("--mode", "swap", "--min-probability", "0.9")
    expected = [turned(row) if i in (1, 5) else row for i, row in enumerate(rows)]
    assert flips(report(), rows, *swap)["rows"] == expected
    text = Features({"chosen": Value("string"), "rejected": Value("large_string")})
    long = Dataset.from_dict({"chosen": ["a"] * 6, "rejected": ["b"] * 6}, features=text)
    assert flips(report(), long, *swap)["rows"][1] == {"chosen": "b", "rejected": "a"}
    mixed = Dataset.from_dict({"chosen": ["a"] * 6, "rejected": [1] * 6})
    assert "'chosen' and 'rejected' are of different types" in flips(report(), mixed, *swap)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_awkward_texts_and_ids_are_read_back_byte_by_byte(flips: Any, suffix: str) -> None:
    """By `poprisk dpo` and `poprisk flips`, which guess no types."""
    awkward = ["None", "NA", "null", "nan", "007", "1e5", "true", "2020-01-01", " x ", "a\r\nb"]
    awkward += ["\u00e9", "e\u0301", "a\u2028b", str(2**53 + 1), "a\rb", '"', "x,y", "\ufeffz"]
    rows = [{"id": t, "prompt": t, "chosen": f"{t}+", "rejected": t} for t in awkward]
    of_these = report([0.5] * len(rows), pair_id=awkward)
    flips(of_these, rows, "--id-column", "id", "--min-probability", "1", out=f"out{suffix}")
    script = ScriptArguments(dataset_name=f"out{suffix}")
    loaded, _ = load_preferences(script, DatasetMixtureConfig(), evaluate=False)
    assert loaded.to_list() == rows
    Path("run/flip_report.parquet").unlink()  # its CSV keeps the ids as well
    options = ("--dataset", f"out{suffix}", "--id-column", "id", "--top", "99")
    found = flips(FlipReport.load("run"), None, *options)
    assert [pair["id"] if "id" in pair else pair["pair_id"] for pair in found["top"]] == [
        pair["prompt"] for pair in found["top"]
    ]


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        (".csv", [{"role": "user"}], "column 'chosen' does not fit into CSV; use .jsonl"),
        (".csv", b"x", "column 'chosen' does not fit into CSV"),
        (".csv", "", "column 'chosen' has an empty text in row 0, which in CSV"),
        (".jsonl", b"x", "row 0 cannot be written as JSON"),
        (".jsonl", datetime.datetime(2020, 1, 1), "row 0 cannot be written as JSON"),
        (".jsonl", math.nan, "row 0 cannot be written as JSON"),
    ],
)
def test_what_a_format_cannot_hold(flips: Any, suffix: str, value: Any, message: str) -> None:
    out = Path(f"out{suffix}")
    out.write_text("before")
    data = Dataset.from_list([{"chosen": value, "rejected": value}])
    assert message in flips(report([0.1]), data, out=str(out))
    assert out.read_text() == "before"
    assert not list(Path().glob(".*"))


# Studies: against scikit-learn on the pairs that have a probability.


def study(flips: Any, found: FlipReport, swapped: set[int]) -> Any:
    Path("run").mkdir(exist_ok=True)
    content = {"rows": sorted(swapped), "num_pairs": len(found)}
    Path("run/label_flips.json").write_text(json.dumps(content))
    return flips(found)["study"]


def test_a_study_equals_scikit_learn(flips: Any) -> None:
    rng = random.Random(1)
    p = [math.nan if i % 10 == 0 else round(rng.random(), 1) for i in range(200)]
    swapped = {i for i in range(200) if rng.random() < (0.5 if math.isnan(p[i]) else p[i])}
    seen = [i for i in range(200) if not math.isnan(p[i])]
    truth, scores = [i in swapped for i in seen], [p[i] for i in seen]
    flags = [score >= 0.5 for score in scores]
    expected = {
        "num_swapped": len(swapped), "num_scored": 180, "swapped_scored": sum(truth),
        "flagged": sum(flags), "auc": roc_auc_score(truth, scores),
        "precision": precision_score(truth, flags), "recall": recall_score(truth, flags),
    }  # fmt: skip
    found = study(flips, report(p), swapped)
    errors = [found.pop(f"calibration_error{end}") for end in ("", "_by_chance")]
    assert found == pytest.approx(expected, abs=1e-12)
    assert errors == [pytest.approx(errors[1], abs=0.05)] * 2  # the swaps were drawn with p


def test_margins_rank_pairs_of_one_probability(flips: Any) -> None:
    margins, truth = [0.5, -1.0, 0.5, -2.0, 3.0, 0.0], [i in {0, 3, 5} for i in range(6)]
    found = study(flips, report([0.0] * 6, margin=margins), {0, 3, 5})
    assert found["auc"] == pytest.approx(roc_auc_score(truth, [-margin for margin in margins]))
    # A probability comes first, whatever the margins say.
    assert study(flips, report([0.2, 0.1], margin=[9.0, -9.0]), {0})["auc"] == 1.0
    nothing = study(flips, report([0.1, 0.2]), set())
    assert [nothing[name] for name in ("auc", "precision", "recall")] == [None] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no record of swapped labels"),
        ("[1]", "is no record of swapped labels"),
        ('{"rows": [0]}', "is no record of swapped labels"),
        ('{"rows": 3, "num_pairs": 2}', "is no record of swapped labels"),
        ('{"rows": [2], "num_pairs": 2}', "not of one run"),
    ],
)
def test_a_record_of_another_run_is_refused(flips: Any, text: str, message: str) -> None:
    Path("run").mkdir()
    Path("run/label_flips.json").write_text(text)
    assert message in flips(report([0.1, 0.2]))


# The picture: every pair is in the histogram once, and the curve ends at the sums.

MARGINS = [-2.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0, math.nan]
PROBABILITIES = [0.95, 0.7, 0.6, 0.3, 0.2, 0.08, 0.0, math.nan]


def drawn(p: list[float], margins: list[float], swapped: Any = None, **changes: Any) -> Figure:
    figure: Figure = draw_flips(report(p, margin=margins, **changes), "run $x$ $\\y$", swapped)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    return figure


def heights(figure: Figure) -> dict[str, float]:
    """Pairs in the bars of each entry of the legend."""
    axis = figure.axes[0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    bars = [sum(bar.get_height() for bar in container) for container in axis.containers]
    return dict(zip(names, bars, strict=True))


def test_picture_by_action() -> None:
    figure = drawn(PROBABILITIES, MARGINS)
    assert heights(figure) == {"swap (1)": 1, "drop (2)": 2, "review (1)": 1, "keep (3)": 3}
    lines = {str(line.get_label()).split(":")[0]: line for line in figure.axes[1].lines}
    sums = [0, 0.95, 1.65, 2.25, 2.55, 2.75, 2.83, 2.83]
    assert list(lines["expected wrong labels"].get_ydata()) == pytest.approx(sums)
    assert [lines[name].get_xdata()[0] for name in ("swap", "drop", "review")] == [1, 3, 4]
    assert "8 pairs, 2.8 wrong" in figure.get_suptitle()


def test_the_line_over_the_margins_is_the_probability() -> None:
    """On an axis of its own, from 0 to 1; marked as a ranking where it is no probability."""
    for calibrated, label in ((True, "P(wrong), line"), (False, "line: ranking only")):
        axes = drawn(PROBABILITIES, MARGINS, calibrated=calibrated).axes[2]
        (line,) = axes.lines
        assert [*line.get_xdata()] == MARGINS[:-1]
        assert [*line.get_ydata()] == PROBABILITIES[:-1]
        assert axes.get_ylim() == (0.0, 1.02)
        assert axes.get_ylabel() == label


def test_picture_of_groups_and_of_calibration() -> None:
    names = [f"name {i} that is too long for it" for i in range(15)]
    rows = [
        {"group": name, "pairs": 9, "suspects": 1, "mean": 0.2, "low": 0.1, "high": 0.3 + i / 100}
        for i, name in enumerate(names)
    ]
    truth = [True, True, False, False, True, False, False]
    bins = reliability(PROBABILITIES[:-1], truth)
    found = report(PROBABILITIES, margin=MARGINS)
    figure = draw_flips(found, "run", {0, 1, 4}, groups={"annotator": rows}, bins=bins)
    calibration, groups = figure.axes[2:4]
    diagonal, dots = calibration.lines
    assert [*diagonal.get_xdata()] == [*diagonal.get_ydata()] == [0, 1]
    full = [one for one in bins if one.count]
    assert [*dots.get_xdata()] == [one.predicted for one in full]
    assert [*dots.get_ydata()] == [one.share for one in full]
    ends = [[*segment[:, 1]] for segment in calibration.collections[0].get_segments()]
    assert ends == [[one.share_low, one.share_high] for one in full]
    labels = [label.get_text() for label in groups.get_yticklabels()]
    assert len(labels) == 12  # the others are in the table
    assert labels[0] == "name 0 …g for it (9)"
    dots, mean = groups.lines
    assert [*dots.get_xdata()] == [0.2] * 12
    assert mean.get_xdata()[0] == pytest.approx(sum(PROBABILITIES[:-1]) / 7)
    ends = [[*segment[:, 0]] for segment in groups.collections[0].get_segments()]
    assert ends == [pytest.approx([row["low"], row["high"]]) for row in rows[:12]]


def test_picture_by_truth() -> None:
    figure = drawn(PROBABILITIES, MARGINS, {0, 2, 6, 7})
    assert heights(figure) == {"swapped on purpose (3)": 3, "not swapped (4)": 4}
    (true,) = [line for line in figure.axes[1].lines if "purpose" in str(line.get_label())]
    assert list(true.get_ydata()) == [0, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("margins", "p"),
    [([1.5], [0.2]), ([0.0] * 5, [0.3] * 5), ([1e30, -1e30], [0.0, 1.0])],
    ids=["one pair", "one value", "huge"],
)
def test_small_and_odd_reports_are_drawn(margins: list[float], p: list[float]) -> None:
    assert sum(heights(drawn(p, margins)).values()) == len(margins)


def test_far_margins_and_other_actions_are_not_lost() -> None:
    margins = [index / 1000 for index in range(1000)] + [500.0]
    figure = drawn([0.1] * 1001, margins)
    assert heights(figure) == {"keep (1001)": 1001}
    assert figure.axes[0].get_xlim()[1] < 2
    assert "outermost bars hold 1 from beyond" in figure.axes[0].get_xlabel()
    figure = drawn(PROBABILITIES[:2], MARGINS[:2], action=["too_long", "drop"])
    assert heights(figure) == {"drop (1)": 1, "no action (1)": 1}


# Texts of every format of pairs, on lines that end with the terminal.

USER = {"role": "user", "content": "q1"}
MORE = [USER, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
TALK = "H: a\n\nA: b\n\nH: c\n\n"
PAIR = {
    "pair_id": "[b]\x1b", "row": 3, "probability_wrong": 0.91251, "margin": -1.5, "action": "swap",
}  # fmt: skip


def said(text: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **more}]


PARTS = [{"type": "image"}, {"type": "text", "text": "what?"}]
TEXTS: list[tuple[tuple[str, str, str], dict[str, Any]]] = [
    (("p", "c", "r"), {"prompt": "p", "chosen": "c", "rejected": "r"}),
    (("q2", "c", "r"), {"prompt": MORE, "chosen": said("c"), "rejected": said("r")}),
    (("q2", "c", "r"), {"chosen": [*MORE, *said("c")], "rejected": [*MORE, *said("r")]}),
    (("H: c\n\nA: ", "yes", "no"), {"chosen": f"{TALK}A: yes", "rejected": f"{TALK}A: no"}),
    (("", "yes", "no"), {"chosen": "yes", "rejected": "no"}),
    (("", "", "r"), {"prompt": None, "chosen": None, "rejected": "r"}),
    (("s", "", "r"), {"prompt": [{"role": "x", "content": "s"}], "chosen": [], "rejected": "r"}),
    (("[image] what?", "[tool call]", ""),
     {"prompt": [{"role": "user", "content": PARTS}], "chosen": said(None, tool_calls=[1]),
      "rejected": said(None)}),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "example"), TEXTS)
def test_texts_of_a_pair(expected: tuple[str, str, str], example: dict[str, Any]) -> None:
    assert pair_texts(example) == expected


@pytest.mark.parametrize("width", [40, 80, 200])
def test_texts_end_with_the_terminal_and_cannot_steer_it(width: int) -> None:
    example = {
        "prompt": "word " * 100,
        "chosen": "東京" * 100,
        "rejected": "[/x]\x07\u202e\x1b[31m",
    }
    console = Console(file=io.StringIO(), width=width)
    print_pairs(console, [PAIR], [example])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    prompt, chosen, rejected = [line for line in text.splitlines() if line.startswith("  ")]
    assert prompt.endswith("…")
    assert width - 3 <= len(prompt.rstrip()) <= width
    assert len(chosen) < width  # these characters are two cells wide
    assert rejected.split() == ["rejected", "[/x]", "[31m"]
    assert "pair [b]" in text
    assert not set("\x1b\x07\r\u202e") & set(text)


def test_a_terminal_breaks_advice_between_words_but_no_command() -> None:
    advice = "Next: look at some pairs; then `poprisk flips run --dataset DATA` leaves them out"
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=30, force_terminal=terminal, no_color=True)
        say(console, advice)
        shown[terminal] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert shown[False] == [advice]
    assert " ".join(shown[True]) == shown[False][0]
    assert "`poprisk flips run --dataset DATA`" in shown[True]
    assert len(shown[True]) == 3
