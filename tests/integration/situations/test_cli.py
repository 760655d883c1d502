"""The command line in situations of public reports, beside the libraries under it."""

import inspect
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.preference_data import load_preferences

pytestmark = [
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: Any) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def plain(name: str) -> list[dict[str, Any]]:
    """As `load_dataset` reads it, on which `trl dpo` relies."""
    kind = "csv" if name.endswith("csv") else "json"
    data: Dataset = load_dataset(kind, data_files=name, split="train")
    return data.to_list()


def ours(name: str) -> list[dict[str, Any]]:
    script, mixture = ScriptArguments(dataset_name=name), DatasetMixtureConfig()
    rows: list[dict[str, Any]] = load_preferences(script, mixture, evaluate=False)[0].to_list()
    return rows


def test_an_answer_that_reads_null() -> None:
    """huggingface/datasets#4467: the word became None, and tokenizers refuse that."""
    name = write("a.csv", "id,chosen,rejected", "1,null,None", "2,yes,no")
    assert plain(name)[0] == {"id": 1, "chosen": None, "rejected": None}
    assert ours(name)[0] == {"id": "1", "chosen": "null", "rejected": "None"}


def test_ids_with_leading_zeros() -> None:
    """sdv-dev/SDV#2780: they are names, not numbers."""
    name = write("a.csv", "id,chosen", "007,a", "0108775015,b")
    assert [row["id"] for row in plain(name)] == [7, 108775015]
    assert [row["id"] for row in ours(name)] == ["007", "0108775015"]


def test_an_answer_that_is_a_date() -> None:
    """r-three/common-pile#98: a text column comes back as datetimes."""
    rows = [{"chosen": "2023-10-14"}, {"chosen": "2024-02-29"}]
    name = write("a.jsonl", *rows)
    assert not isinstance(plain(name)[0]["chosen"], str)
    assert ours(name) == rows


def test_ids_beyond_64_bits() -> None:
    """pandas-dev/pandas#14530: an error there, a rounded number here; two ids become one."""
    ids = [1, 10254939386542155530, 10254939386542155531]
    name = write("a.json", json.dumps([{"id": value} for value in ids]))
    assert len({row["id"] for row in plain(name)}) == 2
    with pytest.raises(UsageError, match=r"'a\.json' row 1: column 'id' cannot be kept"):
        ours(name)


def test_text_and_numbers_in_one_column() -> None:
    """huggingface/datasets#6106: an error then, today a type that reads text once more."""
    name = write("a.jsonl", {"chosen": "true"}, {"chosen": "1e5"}, {"chosen": -0.2253})
    if "on_mixed_types" in inspect.signature(Dataset.from_dict).parameters:
        assert [row["chosen"] for row in plain(name)] == [True, 1e5, -0.2253]
    with pytest.raises(UsageError, match=r"'a\.jsonl' row [02]: column 'chosen'"):
        ours(name)


def test_brackets_in_a_path() -> None:
    """huggingface/datasets#7468: they are taken for a pattern, and nothing is found."""
    folder = Path("[mine]")
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        write(str(folder / name), {"chosen": "a"})
    with pytest.raises(Exception, match="any data file"):
        load_dataset(str(folder))
    assert ours(str(folder / "train.jsonl")) == [{"chosen": "a"}]
    with pytest.raises(UsageError, match=r"'\[mine\]': `datasets` takes brackets"):
        ours(str(folder))


def test_a_pointer_instead_of_the_file() -> None:
    """micasense/imageprocessing#58: a clone without git-lfs holds three lines of text."""
    name = write("a.jsonl", "version https://git-lfs.github.com/spec/v1", "oid sha256:0", "size 9")
    with pytest.raises(DatasetGenerationError, match="occurred while generating"):
        plain(name)
    with pytest.raises(UsageError, match=r"'a\.jsonl' is a Git LFS pointer"):
        ours(name)


def test_the_best_checkpoint_cannot_be_loaded_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """databrickslabs/dolly#38: trained for hours, and ended before the model was saved."""

    def unreadable(trainer: Any) -> None:
        raise OSError("unable to load the best model")

    monkeypatch.setattr("transformers.Trainer._load_best_model", unreadable)
    keys = {
        "model_name_or_path": "builtin:tiny-llama", "dataset_name": "builtin:tiny-pairs",
        "output_dir": "out", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "steps",
        "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "stop": False,
        "noise": "off", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(keys))
    assert main(["dpo", "--config", "config.yaml"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "poprisk: trained; saved in 'out': model and trainer state; failed: end of training: "
        "unable to load the best model"
    )
    assert Path("out", "model.safetensors").exists()


def test_a_terminal_that_knows_no_ellipsis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Textualize/rich#3388: after all the work, the summary ends in UnicodeEncodeError."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["recipes"]) == 0
    assert b"dpo-noisy-zero3" in written.getvalue()


def test_whoever_reads_has_seen_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pypa/pip#13878: `... | head -1` ends in a traceback."""
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["env", "--json"]) == 141
    assert capsys.readouterr().err == ""
