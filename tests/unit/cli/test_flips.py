"""The command: what it prints, draws, writes and refuses."""

import json
import math
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from poprisk_integrations.cli.commands import flips as flips_command
from poprisk_integrations.cli.main import main
from poprisk_integrations.trl.flip_report import FlipReport

COUNT = 40
RNG = random.Random(3)
P = [math.nan if i % 13 == 5 else round(RNG.random(), 3) for i in range(COUNT)]
ROWS = [
    {"id": f"id-{i}", "prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "extra": i}
    for i in range(COUNT)
]
RANKED = sorted((i for i in range(COUNT) if P[i] == P[i]), key=lambda i: (-P[i], i))
ESTIMATE = {
    "slope": 2.0,
    "maximum_likelihood": 0.3,
    "upper_bound": 0.3,
    "anchor": 0.2,
    "num_pairs": 37,
    "method": "m",
}
SWAPPED = [i for i in range(COUNT) if i % 3 == 0]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(f"{flips_command.__name__}.find_spec", lambda name: None)  # no picture
    Dataset.from_list(ROWS).to_json(tmp_path / "data.jsonl")
    save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def drawing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the picture, which takes most of the time."""
    monkeypatch.setattr(flips_command, "find_spec", find_spec)


def save(directory: Path, ids: Any = None, **changes: Any) -> None:
    columns = {
        "pair_id": range(COUNT) if ids is None else ids,
        "row": range(COUNT),
        "probability_wrong": P,
        "margin": [0.5 - p for p in P],
        "step": [-1 if p != p else 0 for p in P],
    }
    FlipReport(**{**columns, **changes}).save(directory)


def study(run_dir: Path) -> None:
    content = {"rows": SWAPPED, "num_pairs": COUNT, "flip_rate": 0.3}
    (run_dir / "label_flips.json").write_text(json.dumps(content))


def flips(*arguments: Any) -> int:
    return main(["flips", *map(str, arguments)])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert flips(*arguments, "--json") == 0
    captured = capsys.readouterr()
    assert "poprisk" not in captured.err
    found: dict[str, Any] = json.loads(captured.out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert flips(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("poprisk: ")]
    assert captured.out == ""
    return line.removeprefix("poprisk: ")


@pytest.mark.usefixtures("drawing")
def test_top_pairs_and_picture(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flips(run_dir, "--top", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(FlipReport.load(run_dir))
    table = [
        line.split() for line in lines if line.strip() and line.split()[-1] in ("swap", "drop")
    ]
    expected = [[str(i), f"{P[i]:.3f}", f"{0.5 - P[i]:.3f}"] for i in RANKED[:3]]
    assert [row[:3] for row in table] == expected
    assert lines[-1] == str(run_dir / "flip_report.png")
    assert (run_dir / "flip_report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run_dir.glob("*.tmp*"))


def test_texts_of_the_data(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flips(run_dir, "--dataset", run_dir.parent / "data.jsonl", "--top", 2) == 0
    out = capsys.readouterr().out
    at = [out.index(f"{name:<8}  {text} {i}\n") for i in RANKED[:2]
          for name, text in (("prompt", "p"), ("chosen", "good"), ("rejected", "bad"))]  # fmt: skip
    assert at == sorted(at)


@pytest.mark.usefixtures("drawing")
def test_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = {"rate": 0.31, "low": 0.26, "high": 0.36, "method": "m", "num_pairs": 37}
    (run_dir / "poprisk_noise.json").write_text(json.dumps(noise))
    found = as_json(capsys, run_dir, "--dataset", run_dir.parent / "data.jsonl", "--top", 2)
    assert found["summary"] == FlipReport.load(run_dir).summary()
    assert found["noise"] == noise
    assert found["study"] is None
    assert found["written"] is None
    assert [pair["pair_id"] for pair in found["top"]] == RANKED[:2]
    assert found["top"][0]["chosen"] == f"good {RANKED[0]}"
    assert found["top"][1]["probability_wrong"] == P[RANKED[1]]
    assert Path(found["figure"]).is_file()


@pytest.mark.parametrize(
    ("noise", "line"),
    [
        (
            ESTIMATE | {"rate": 0.31, "low": 0.26, "high": 0.36},
            "31 % of the labels look wrong (95 % interval 26 to 36 %, 37 pairs)",
        ),
        (
            ESTIMATE | {"rate": 0.4, "low": 0.0, "high": 0.48, "upper_bound": 0.49},
            "the margins do not tell how many labels are wrong (0 to 48 %, 37 pairs)",
        ),
        ({"rate": 0.2, "method": "double labels"}, "20 % of the labels look wrong"),
        ({"rate": None, "num_pairs": 3}, "noise rate not estimated"),
    ],
)
def test_noise_rate(
    run_dir: Path, noise: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "poprisk_noise.json").write_text(json.dumps(noise))
    assert flips(run_dir, "--top", 0) == 0
    assert capsys.readouterr().out.splitlines()[1] == line


def test_a_rate_that_is_not_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = {"rate": None, "low": 0.0, "high": 0.4, "num_pairs": 37, "reference_rate": 0.2}
    (run_dir / "poprisk_noise.json").write_text(json.dumps(noise))
    assert flips(run_dir, "--top", 0) == 0
    line = "the margins do not tell how many labels are wrong (0 to 40 %, 37 pairs)"
    assert capsys.readouterr().out.splitlines()[1] == line


def test_a_ranking_is_not_cut_by_itself(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir, calibrated=False)
    out, data = run_dir.parent / "out.jsonl", run_dir.parent / "data.jsonl"
    assert flips(run_dir, "--top", 2) == 0
    assert "P(wrong) ranks the pairs and is no probability here" in capsys.readouterr().out
    message = refused(capsys, run_dir, "--dataset", data, "--write", out)
    assert "no place to cut: say where with --min-probability" in message
    assert not out.exists()
    options = ("--dataset", data, "--write", out, "--min-probability", 0.8)
    found = as_json(capsys, run_dir, *options)
    assert found["summary"]["calibrated"] is False
    assert found["written"]["dropped"] == len(suspects(0.8))


def test_what_to_do_next_is_a_command_that_works(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = run_dir.parent / "data.jsonl"
    assert flips(run_dir, "--dataset", data) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    monkeypatch.chdir(run_dir)
    assert flips(run_dir, *line[line.index("--dataset") :].split(), "--quiet") == 0
    assert len((run_dir / "clean.jsonl").read_text().splitlines()) == COUNT - len(suspects(0.9))


def test_the_report_s_own_texts_are_shown(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run_dir, texts={i: (f"ask {i}", f"left {i}", f"right {i}") for i in RANKED[:3]})
    assert flips(run_dir, "--top", 3) == 0
    out = capsys.readouterr().out
    names = (("prompt", "ask"), ("chosen", "left"), ("rejected", "right"))
    at = [out.index(f"{name:<8}  {text} {i}\n") for i in RANKED[:3] for name, text in names]
    assert at == sorted(at)
    found = as_json(capsys, run_dir, "--top", 1)
    assert found["top"][0]["prompt"] == f"ask {RANKED[0]}"


def test_min_probability_hides_pairs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, run_dir, "--min-probability", 0.8, "--top", 1000)
    assert [pair["row"] for pair in found["top"]] == [i for i in RANKED if P[i] >= 0.8]


@pytest.mark.usefixtures("drawing")
def test_quiet(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_dir.parent / "out.jsonl"
    data = run_dir.parent / "data.jsonl"
    capsys.readouterr()
    arguments = ("--quiet", "--dataset", data, "--write", out, "--figure", run_dir / "x.png")
    assert flips(run_dir, *arguments) == 0
    assert capsys.readouterr().out == ""
    assert out.is_file()
    assert (run_dir / "x.png").is_file()
    assert not (run_dir / "flip_report.png").exists()


def suspects(threshold: float) -> set[int]:
    return {i for i in range(COUNT) if P[i] >= threshold}


def turned(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


EXPECTED: dict[tuple[str, ...], list[dict[str, Any]]] = {
    (): [r for i, r in enumerate(ROWS) if i not in suspects(0.5)],
    ("--min-probability", "0.8"): [r for i, r in enumerate(ROWS) if i not in suspects(0.8)],
    ("--mode", "swap"): [turned(r) if i in suspects(0.5) else r for i, r in enumerate(ROWS)],
    ("--mode", "suggested"): [
        turned(r) if i in suspects(0.9) else r
        for i, r in enumerate(ROWS)
        if i not in suspects(0.5) - suspects(0.9)
    ],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("options", list(EXPECTED), ids=lambda o: "-".join(o) or "default")
def test_cleaned_data(
    run_dir: Path, options: tuple[str, ...], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_dir.parent / f"out{suffix}"
    data = run_dir.parent / "data.jsonl"
    written = as_json(capsys, run_dir, "--dataset", data, "--write", out, *options)["written"]
    found = load_dataset({".jsonl": "json"}.get(suffix, suffix[1:]), data_files=str(out))["train"]
    assert found.column_names == list(ROWS[0])
    assert found.to_list() == EXPECTED[options]
    assert written["pairs"] == len(EXPECTED[options]) == COUNT - written["dropped"]
    assert written["swapped"] == sum(row["chosen"].startswith("bad") for row in found)


def test_the_line_counts(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_dir.parent / "out.csv"
    options = ("--mode", "suggested", "--write", out, "--dataset", run_dir.parent / "data.jsonl")
    assert flips(run_dir, *options) == 0
    swap, drop = len(suspects(0.9)), len(suspects(0.5)) - len(suspects(0.9))
    assert min(swap, drop) > 0
    expected = f"{out}: {COUNT - drop} pairs, {drop} dropped, {swap} swapped"
    assert expected in capsys.readouterr().out.splitlines()


def test_columns_of_one_completion_are_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = run_dir.parent / "scored.jsonl", run_dir.parent / "out.jsonl"
    Dataset.from_list([{**row, "score_chosen": 1.5} for row in ROWS]).to_json(data)
    assert flips(run_dir, "--dataset", data, "--write", out, "--mode", "swap") == 0
    assert " swapped; score_chosen not swapped\n" in capsys.readouterr().out
    assert all(json.loads(line)["score_chosen"] == 1.5 for line in out.read_text().splitlines())


def test_an_edited_csv_decides(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "flip_report.csv"
    table = FlipReport.load(path).to_pandas()
    table["action"] = ["swap" if row == 7 else "keep" for row in table["row"]]
    table.to_csv(path, index=False)
    out, data = run_dir.parent / "out.jsonl", run_dir.parent / "data.jsonl"
    written = as_json(
        capsys, path, "--dataset", data, "--write", out, "--mode", "suggested"
    )["written"]  # fmt: skip
    assert (written["dropped"], written["swapped"]) == (0, 1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [turned(row) if i == 7 else row for i, row in enumerate(ROWS)]


def test_ids_of_a_column(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run_dir, ids=[f"id-{i}" for i in range(COUNT)])
    shuffled = RNG.sample(ROWS, COUNT)
    Dataset.from_list(shuffled).to_json(run_dir.parent / "shuffled.jsonl")
    out = run_dir.parent / "out.jsonl"
    options = ("--dataset", run_dir.parent / "shuffled.jsonl", "--id-column", "id")
    found = as_json(capsys, run_dir, *options, "--write", out)
    assert [pair["prompt"] for pair in found["top"][:3]] == [f"p {i}" for i in RANKED[:3]]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [row for row in shuffled if row["extra"] not in suspects(0.5)]
    message = refused(capsys, run_dir, *options[:2])
    assert "name their column of the data set with --id-column" in message


def test_a_study_is_scored_and_shown_as_trained(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(run_dir)
    out = run_dir.parent / "out.jsonl"
    options = ("--dataset", run_dir.parent / "data.jsonl", "--top", COUNT)
    found = as_json(capsys, run_dir, *options, "--write", out, "--min-probability", 0.2)
    scored = [i for i in SWAPPED if P[i] == P[i]]
    wins = [(P[i] > P[j]) + (P[i] == P[j]) / 2 for i in scored for j in RANKED if j not in scored]
    assert found["study"]["auc"] == pytest.approx(sum(wins) / len(wins))
    hits = len(suspects(0.5) & set(SWAPPED))
    assert found["study"]["precision"] == pytest.approx(hits / len(suspects(0.5)))
    assert found["study"]["recall"] == pytest.approx(hits / len(scored))
    for pair in found["top"]:
        assert pair["chosen"] == f"{'bad' if pair['row'] in SWAPPED else 'good'} {pair['row']}"
    trained = [turned(row) if i in SWAPPED else row for i, row in enumerate(ROWS)]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [row for i, row in enumerate(trained) if i not in suspects(0.2)]
    capsys.readouterr()
    assert flips(run_dir, "--top", 5) == 0
    text = capsys.readouterr().out
    assert f"{len(SWAPPED)} labels were swapped on purpose (label_flips.json): AUC 0." in text
    marks = [
        line.split()[-1] for line in text.splitlines() if line.split()[-1:] in (["yes"], ["no"])
    ]
    assert marks == ["yes" if i in SWAPPED else "no" for i in RANKED[:5]]


@pytest.mark.usefixtures("drawing")
def test_nothing_to_draw(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = [math.nan] * COUNT
    save(run_dir, probability_wrong=nothing, margin=nothing, step=[-1] * COUNT)
    assert flips(run_dir) == 0
    assert "No picture: no pair has a probability" in capsys.readouterr().out
    assert not (run_dir / "flip_report.png").exists()


def test_without_matplotlib(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flips(run_dir) == 0
    assert "No picture: matplotlib not found. Run: pip install" in capsys.readouterr().out


def test_a_file_is_replaced_only_by_force(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_dir.parent / "out.jsonl"
    out.write_text("mine")
    options = (run_dir, "--dataset", run_dir.parent / "data.jsonl", "--write", out)
    assert "exists (--force replaces a file)" in refused(capsys, *options)
    assert out.read_text() == "mine"
    assert flips(*options, "--force", "--quiet") == 0
    assert len(out.read_text().splitlines()) == COUNT - len(suspects(0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write", "x.jsonl"], "--write needs --dataset"),
        (["--id-column", "id"], "--id-column needs --dataset"),
        (["--dataset", "d", "--mode", "drop"], "--mode is for --write"),
        (["--dataset", "d", "--force"], "--force is for --write"),
        (["--dataset", "d", "--write", "x.txt"], "Must end in .jsonl, .csv, .parquet"),
        (["--dataset", "d", "--write", "no/such/x.csv"], "Its directory does not exist"),
        (["--figure", "no/such/x.png"], "Invalid --figure"),
        (["--top", "-1"], "--top: '-1' must be an integer >= 0"),
        (["--min-probability", "2"], r"'2' must be in [0, 1]"),
        (["--min-probability", "nan"], "'nan' must be in [0, 1]"),
        (["--mode", "keep"], "invalid choice: 'keep'"),
        (
            ["--dataset", "d", "--write", "x.csv", "--mode", "suggested", "--min-probability", "1"],
            "no --min-probability",
        ),
    ],
)
def test_options_that_are_refused(
    run_dir: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, run_dir, *options)


def test_inputs_that_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = run_dir.parent
    assert "no flip_report.parquet or flip_report.csv in" in refused(capsys, parent)
    assert "no flip report at" in refused(capsys, parent / "nowhere")
    assert "is not a flip report" in refused(capsys, parent / "data.jsonl")
    Dataset.from_list(ROWS[:9]).to_json(parent / "short.jsonl")
    message = refused(capsys, run_dir, "--dataset", parent / "short.jsonl")
    assert f"The flip report is of {COUNT} pairs, --dataset has 9" in message
    (parent / "folder").mkdir()
    (parent / "data.jsonl").rename(parent / "folder" / "train.jsonl")
    message = refused(capsys, run_dir, "--dataset", parent / "folder", "--split", "x")
    assert "the data have no split 'x'; found 'train'" in message
    (run_dir / "poprisk_noise.json").write_text("[")
    assert "is no estimate of a noise rate" in refused(capsys, run_dir)
    assert not (run_dir / "flip_report.png").exists()
