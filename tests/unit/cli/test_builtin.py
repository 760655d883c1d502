"""Built-in model and data: the same everywhere, whole or not there, and refused by a wrong name."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ScriptArguments

from poprisk_integrations.cli.builtin import check_names, load_pairs, local_model
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.preference_data import load_preferences
from poprisk_integrations.trl.pair_scan import PairScan, scan_pairs

MODEL, PAIRS = "builtin:tiny-llama", "builtin:tiny-pairs"


def parameters(path: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_model_is_small_the_same_everywhere_and_written_once(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first = local_model(MODEL, tmp_path / "a")
    assert first == str(tmp_path / "a" / "builtin-tiny-llama")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    weights = parameters(first)
    assert torch.equal(weights, parameters(local_model(MODEL, tmp_path / "b")))
    assert 10_000 <= len(weights) <= 100_000
    assert weights.std() > 0.01
    before = Path(first, "model.safetensors").stat().st_mtime_ns
    assert local_model(MODEL, tmp_path / "a") == first
    assert Path(first, "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["builtin-tiny-llama"]


def test_pairs_are_usable_and_the_tokenizer_reads_them_without_loss(tmp_path: Path) -> None:
    path = local_model(MODEL, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoModelForCausalLM.from_pretrained(path).config
    assert config.vocab_size == len(tokenizer)
    data = load_pairs(PAIRS)
    assert {name: split.num_rows for name, split in data.items()} == {"train": 96, "test": 32}
    assert data["train"].to_list() == load_pairs(PAIRS)["train"].to_list()
    assert len({*data["train"]["pair_id"], *data["test"]["pair_id"]}) == 128
    for split in data.values():
        assert split.column_names == ["pair_id", "prompt", "chosen", "rejected"]
        assert scan_pairs(split) == PairScan()
        for row in split:
            last = row["prompt"].split()[-1]
            assert row["chosen"].split()[0] == last != row["rejected"].split()[0]
            for completion in (row["chosen"], row["rejected"]):
                text = row["prompt"] + completion
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
                assert len(ids) < config.max_position_embeddings


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
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "theirs").touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    path = Path(local_model(MODEL, tmp_path))
    assert [entry.name for entry in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


def test_other_names_pass_and_unknown_ones_write_nothing(tmp_path: Path) -> None:
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    check_names(name, None)
    assert local_model(name, tmp_path / "out") == name
    with pytest.raises(UsageError, match="known: builtin:tiny-llama"):
        local_model("builtin:large-llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="known: builtin:tiny-pairs"):
        load_pairs(MODEL)


@pytest.mark.parametrize("streaming", [False, True])
def test_as_preference_data(streaming: bool) -> None:
    script: Any = ScriptArguments(dataset_name=PAIRS, dataset_streaming=streaming)
    train, test = load_preferences(script, DatasetMixtureConfig(), evaluate=True)
    assert hasattr(train, "__len__") is not streaming
    assert [row["pair_id"] for row in train][:2] == ["train-0", "train-1"]
    assert [row["pair_id"] for row in test][-1] == "test-31"
