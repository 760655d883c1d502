"""Built-in model and data: the same everywhere, whole or not there, and refused by a wrong name."""

import os
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.builtin import check_names, is_builtin, load_pairs, local_model
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.preference_data import load_preferences
from poprisk_integrations.trl.validation import unusable_rows

MODEL, PAIRS = "builtin:tiny-llama", "builtin:tiny-pairs"


def parameters(path: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_model_is_small_and_the_same_everywhere(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = local_model(MODEL, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = local_model(MODEL, tmp_path / "b")
    weights = parameters(first)
    assert torch.equal(weights, parameters(second))
    assert 10_000 <= len(weights) <= 100_000
    assert weights.std() > 0.01


def test_tokenizer_reads_the_pairs_without_loss(tmp_path: Path) -> None:
    path = local_model(MODEL, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(tokenizer)
    longest = 0
    for split in load_pairs(PAIRS).values():
        for row in split:
            for completion in (row["chosen"], row["rejected"]):
                text = row["prompt"] + completion
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
                longest = max(longest, len(ids))
    assert longest < AutoModelForCausalLM.from_pretrained(path).config.max_position_embeddings


def test_pairs() -> None:
    data = load_pairs(PAIRS)
    assert isinstance(data, DatasetDict)
    assert {name: split.num_rows for name, split in data.items()} == {"train": 96, "test": 32}
    assert data["train"].to_list() == load_pairs(PAIRS)["train"].to_list()
    ids = [*data["train"]["pair_id"], *data["test"]["pair_id"]]
    assert len(set(ids)) == len(ids)
    for split in data.values():
        assert split.column_names == ["pair_id", "prompt", "chosen", "rejected"]
        assert unusable_rows(split) == ([], [])
        for row in split:
            last = row["prompt"].split()[-1]
            assert row["chosen"].split()[0] == last != row["rejected"].split()[0]


def test_model_is_written_once_and_whole(tmp_path: Path) -> None:
    path = Path(local_model(MODEL, tmp_path / "out"))
    assert path == tmp_path / "out" / "builtin-tiny-llama"
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert local_model(MODEL, tmp_path / "out") == str(path)
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [path.name]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("poprisk_integrations.cli.builtin.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        local_model(MODEL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_process_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr("poprisk_integrations.cli.builtin.os.rename", late)
    path = Path(local_model(MODEL, tmp_path))
    assert [entry.name for entry in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


def test_other_names_pass(tmp_path: Path) -> None:
    check_names("Qwen/Qwen2.5-0.5B-Instruct", None)
    assert local_model("Qwen/Qwen2.5-0.5B-Instruct", tmp_path / "out") == (
        "Qwen/Qwen2.5-0.5B-Instruct"
    )
    assert not (tmp_path / "out").exists()
    assert not is_builtin(None)


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        ("builtin:llama", PAIRS, "model_name_or_path: no built-in model 'builtin:llama'; known: "),
        (PAIRS, PAIRS, "known: builtin:tiny-llama"),
        (MODEL, "builtin:", "dataset_name: no built-in data set 'builtin:'; known: builtin:tiny-p"),
        (MODEL, MODEL, "known: builtin:tiny-pairs"),
    ],
)
def test_unknown_names(model: str, dataset: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        check_names(model, dataset)


def test_unknown_names_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known: builtin:tiny-llama"):
        local_model("builtin:large-llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="known: builtin:tiny-pairs"):
        load_pairs("builtin:large-pairs")


@pytest.mark.parametrize("streaming", [False, True])
def test_as_preference_data(streaming: bool) -> None:
    script = ScriptArguments(dataset_name=PAIRS, dataset_streaming=streaming)
    train, test = load_preferences(script, DatasetMixtureConfig(), evaluate=True)
    assert hasattr(train, "__len__") is not streaming
    assert [row["pair_id"] for row in train][:2] == ["train-0", "train-1"]
    assert [row["pair_id"] for row in test][-1] == "test-31"
