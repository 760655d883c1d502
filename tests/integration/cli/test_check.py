"""`poprisk check` on files, and the same findings at the start of `poprisk dpo`.

What it prints and refuses is in tests/goldens/cli/check.txt.
"""

import json
import logging
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.preference_data import load_split
from poprisk_integrations.trl.pair_checks import check_pairs
from tests.helpers.tiny_dpo import pairs, save_model

WORDS = [f"word{i}" for i in range(2000)]


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_same_of_every_kind_of_file(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *pairs(6).add_column("worker_id", [7, 8] * 3),
        {"prompt": "ash", "chosen": " bay", "rejected": " bay", "worker_id": 7},
        {"prompt": "ash", "chosen": None, "rejected": " bay", "worker_id": None},
    ]
    data = Dataset.from_list(rows)
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix](f"a.{suffix}")
    capsys.readouterr()
    assert main(["check", f"a.{suffix}", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    rows_of = {finding["name"]: finding["rows"] for finding in found["findings"]}
    assert (rows_of["empty"], rows_of["identical"]) == ([7], [6])
    assert (found["num_pairs"], found["annotator_column"]) == (8, "worker_id")
    assert {one["name"].removesuffix(".0"): one["pairs"] for one in found["annotators"]} == {
        "7": 3, "8": 3,
    }  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("noise", ["auto", "off"])
def test_a_training_says_it_first_and_trains(
    noise: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = pairs(24).to_list()
    turned = {**good[0], "chosen": good[0]["rejected"], "rejected": good[0]["chosen"]}
    unknown = {"prompt": "ash", "chosen": " Bay", "rejected": " Cat"}
    clean, faulty = good[1:9], [*good, good[1], turned, unknown]
    said = {}
    for name, rows in {"clean": clean, "faulty": faulty}.items():
        Dataset.from_list(rows).to_json(f"{name}.jsonl")
        keys: dict[str, Any] = {
            "model_name_or_path": save_model(tmp_path / "model"),
            "dataset_name": f"{name}.jsonl", "output_dir": "out", "use_cpu": True, "bf16": False,
            "max_steps": 1, "noise": noise, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "per_device_train_batch_size": 2, "max_length": 9,
        }  # fmt: skip
        Path("config.yaml").write_text(yaml.safe_dump(keys))
        caplog.clear()
        assert main(["dpo", "--config", "config.yaml"]) == 0
        said[name] = [
            record.message
            for record in caplog.records
            if record.levelno == logging.WARNING and record.message.startswith("train_dataset: ")
        ]
    assert said["clean"] == []
    starts = [
        "1 of 27 pairs: the same pair and label as an earlier row (row 24). Advice: leave copies",
        "1 of 27 pairs: labelled the other way in an earlier row (row 25). Advice: look at",
        "2 of 27 pairs: labelled more than once; ",
        "1 of 27 pairs: to the tokenizer both answers are the same, or one is unknown (row 26).",
    ]
    without_length = [line for line in said["faulty"] if "different lengths" not in line]
    for line, start in zip(without_length, starts, strict=True):
        assert line.startswith(f"train_dataset: {start}")


def write_pairs(path: Path, count: int) -> None:
    """Pairs of about 500 characters, by five annotators, a fifth of them labelled twice."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choices(WORDS, k=length))

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        row = {"prompt": text(20), "chosen": text(rng.randint(15, 30)), "rejected": text(22)}
        rows.append({**row, "annotator": rng.randrange(5)})
        if len(rows) % 5 == 0 and len(rows) < count:
            rows.append({**row, "annotator": rng.randrange(5)})
    mean = sum(len(r["prompt"] + r["chosen"] + r["rejected"]) for r in rows) / count
    assert 450 < mean < 550
    Dataset.from_list(rows).to_parquet(path)


# The peak of a process is that of its parent until then: one that has imported nothing starts it.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.slow
def test_a_hundred_thousand_pairs_take_seconds_and_little_memory() -> None:
    """Beyond a check of 100 pairs 7 s and 182 MiB, most of it the file, on two busy cores."""
    seconds, peaks = [], []
    for count in (100, 100_000):
        write_pairs(Path(f"{count}.parquet"), count)
        environment = {**os.environ, "HF_DATASETS_CACHE": f"cache{count}"}
        command = [sys.executable, "-m", "poprisk_integrations.cli", "check", f"{count}.parquet"]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *command, "--json"],
            capture_output=True, env=environment, text=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["num_pairs"] == count
        peaks.append(float(done.stderr.split()[-1]))
    print(f"seconds {seconds}, MiB {peaks}")
    assert seconds[1] - seconds[0] < 60
    assert peaks[1] - peaks[0] < 300


@pytest.mark.slow
def test_no_text_is_kept() -> None:
    """100,000 pairs are 60 MB of text; the check holds 23 MB at most."""
    write_pairs(Path("pairs.parquet"), 100_000)
    data = load_split("pairs.parquet", "train")
    tracemalloc.start()
    try:
        check_pairs(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak < 40e6
