"""What cannot work is refused before anything is tokenized, loaded or written."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig

from poprisk_integrations.trl import PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, dpo_trainer, needs_trl, pairs, tiny_model


def start(output_dir: Path, train: Any = None, evaluation: Any = None, **options: Any) -> None:
    """The model does not exist: whoever gets as far as loading it fails with another error."""
    dpo_trainer(output_dir, train, evaluation, model="no/such-model", ref_model=None, **options)


def same(row: dict[str, str]) -> dict[str, str]:
    return {**row, "rejected": row["chosen"]}


def test_data_are_checked_first(tmp_path: Path) -> None:
    bad = {
        "no column 'rejected'": pairs().remove_columns("rejected"),
        "16 rows .first: row 0. whose chosen and rejected are the same": pairs().map(same),
        "1 row .first: row 1. with an empty": Dataset.from_list([*pairs(1), {"chosen": "a"}]),
    }
    for message, data in bad.items():
        with pytest.raises(ValueError, match=f"train_dataset has {message}"):
            start(tmp_path, data, per_device_train_batch_size=1)
        with pytest.raises(ValueError, match=f"eval_dataset has {message}"):
            start(tmp_path, evaluation=data)
        with pytest.raises(ValueError, match=rf"eval_dataset\['clean'\] has {message}"):
            start(tmp_path, evaluation={"clean": data})
    assert list(tmp_path.iterdir()) == []


def test_output_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="output_dir"):
        start(tmp_path / "file" / "run")


def test_other_config_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a PopRiskDPOConfig, not DPOConfig"):
        PopRiskDPOTrainer("no/such-model", args=DPOConfig(**config_options(tmp_path)))


def test_reference_with_another_vocabulary(tmp_path: Path) -> None:
    other = tiny_model()
    other.resize_token_embeddings(32)
    with pytest.raises(ValueError, match="its vocabulary has 32 tokens, that of the model 15"):
        dpo_trainer(tmp_path, ref_model=other)


@needs_trl("1.9", "filter for prompts that fill max_length")
def test_dropped_pairs_and_short_epochs_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*pairs(12)]
    rows[3]["prompt"] = " ".join(["ash"] * 30)
    dpo_trainer(tmp_path, Dataset.from_list(rows), max_length=24, max_steps=1).train()
    assert "1 of 12 training pairs were dropped: their prompts alone fill max_length" in caplog.text
    assert "One epoch of 12 pairs has fewer than 4 optimizer steps (batches of 4)" in caplog.text


@needs_trl("1.9", "precomputation for a model in memory")
def test_sampling_without_a_reference(tmp_path: Path) -> None:
    options = {"precompute_ref_log_probs": True, "on_policy_kl_samples": 4}
    with pytest.raises(ValueError, match=r"on_policy_kl_samples: 4. With precompute_ref_log_probs"):
        dpo_trainer(tmp_path, ref_model=None, **options)
