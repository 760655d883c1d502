"""What people meet who look for wrong labels, by public reports, done with ours.

Each test names the report. Plain TRL has neither an estimate nor a report.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset

from poprisk_integrations.cli.main import main
from poprisk_integrations.core.noise_rate import UntrainedMargins, estimate_noise_rate
from poprisk_integrations.trl import FlipReport


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("poprisk_integrations.cli.output.find_spec", lambda name: None)


def recorded(margins: np.ndarray, step: Any) -> UntrainedMargins:
    record = UntrainedMargins(len(margins))
    record.record(torch.arange(len(margins)), torch.as_tensor(margins), step)
    return record


def write_run(directory: Path, ids: list[str], texts: dict[int, tuple[str, str, str]]) -> None:
    wrong = [0.95 - 0.2 * place for place in range(len(ids))]
    FlipReport(
        pair_id=ids,
        row=range(len(ids)),
        probability_wrong=wrong,
        margin=[-p for p in wrong],
        step=[1] * len(ids),
        texts=texts,
    ).save(directory)


def flips(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["flips", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_how_good_must_the_model_be() -> None:
    """cleanlab/cleanlab#66: "it just won't work well, because your model doesn't work well"."""
    rng = np.random.default_rng(0)
    steps = torch.arange(2000) // 16
    for signal in (0.05, 0.2, 0.35):  # right about 52, 58 and 64 % of clean pairs
        estimate = estimate_noise_rate(recorded(rng.normal(signal, 1, 2000), steps))
        assert (estimate.rate, estimate.low) == (None, 0.0)
        assert estimate.high > 0.25
    strong = estimate_noise_rate(recorded(rng.normal(1.5, 1, 2000), steps))
    assert strong.rate is not None
    assert strong.low == 0.0
    assert strong.high < 0.06


def test_in_sample_margins_look_clean() -> None:
    """cleanlab/cleanlab#52: a model's word about what it was trained on says nothing."""
    rng = np.random.default_rng(0)
    wrong = rng.random(2000) < 0.2
    first = np.where(wrong, -1, 1) * rng.normal(1.5, 1, 2000)
    record = recorded(first, torch.arange(2000) // 16)
    before = estimate_noise_rate(record)
    memorised = torch.full((2000,), 5.0)  # a later epoch: every label is fitted
    record.record(torch.arange(2000), memorised, step=200)
    assert estimate_noise_rate(record) == before
    assert before.low < 0.2 < before.high


def test_batches_of_one_pair() -> None:
    """huggingface/trl#2371: of one pair per step each margin is a step's size of its own."""
    rng = np.random.default_rng(0)
    margins = np.concatenate([[0.0], rng.normal(1.5, 1, 600)])
    estimate = estimate_noise_rate(recorded(margins, torch.arange(601)))
    assert estimate.num_not_judged <= 3  # the first, whose margin is the reference's own
    assert estimate.rate is not None


def test_cleaned_data_are_not_cleaned_again_by_the_old_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cleanlab/cleanlab#1160: cleaning in rounds; the report of one round fits its data alone."""
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(5)]
    data, clean = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    write_run(tmp_path, list(range(5)), {0: ("p0", "c0", "r0")})  # type: ignore[arg-type]
    options = ("--write", clean, "--min-probability", 0.9)
    assert flips(capsys, tmp_path, "--dataset", data, *options)[0] == 0
    assert [json.loads(line) for line in clean.read_text().splitlines()] == rows[1:]
    status, said = flips(capsys, tmp_path, "--dataset", clean, "--write", tmp_path / "2.jsonl")
    assert status == 2
    assert "train with pair_id_column=NAME" in said
    # As many rows as before, but others: the texts tell.
    data.write_text("\n".join(map(json.dumps, [*rows[1:], rows[0]])))
    status, said = flips(capsys, tmp_path, "--dataset", data, "--write", tmp_path / "2.jsonl")
    assert (status, "Row 0 of --dataset has other texts" in said) == (2, True)


def test_ids_with_leading_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """apache/arrow#46853: "001" becomes 1; then 001 and 1 are one id, or no pair is found."""
    ids = ["001", "1", "01", "1.0"]
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["id", "prompt", "chosen", "rejected"])
        writer.writerows([name, "p", f"c {name}", "r"] for name in reversed(ids))
    guessed = load_dataset("csv", data_files=str(path), split="train")["id"][:]
    assert guessed == [1.0, 1.0, 1.0, 1.0]  # what the loader of `datasets` makes of them
    write_run(tmp_path, ids, {})
    # A spreadsheet that keeps text, but not the quotation marks.
    report = tmp_path / "flip_report.csv"
    report.write_text(report.read_text().replace('"', ""))
    out = tmp_path / "clean.csv"
    options = ("--id-column", "id", "--write", out, "--min-probability", 0.9)
    assert flips(capsys, report, "--dataset", path, *options)[0] == 0
    with out.open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["1.0", "01", "1"]


def test_texts_that_read_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """huggingface/datasets#4467: the answer "null" becomes no answer."""
    words = ["null", "NA", "None", "nan"]
    rows = [
        {"id": word, "prompt": "p", "chosen": word, "rejected": f"not {word}"} for word in words
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "clean.csv"
    data.write_text("\n".join(map(json.dumps, rows)))
    write_run(tmp_path, words, {})
    options = ("--id-column", "id", "--write", out, "--min-probability", 0.9)
    assert flips(capsys, tmp_path, "--dataset", data, *options)[0] == 0
    # Once more with the file that was written: three pairs, and each is found.
    status, said = flips(capsys, tmp_path, "--dataset", out, "--id-column", "id", "--top", 9)
    assert status == 2  # the fourth is gone, and it is said by name
    assert "(such as 'null') are not in column 'id'" in said
    with out.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows[1:]
