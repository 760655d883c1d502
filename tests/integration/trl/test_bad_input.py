"""What cannot work is refused before anything is tokenized, loaded or written."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, pairs

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def start(output_dir: Path, *, train: Any = None, evaluation: Any = None, **options: Any) -> None:
    """The model does not exist: whoever gets as far as loading it fails with another error."""
    PopRiskDPOTrainer(
        "no/such-model",
        args=PopRiskDPOConfig(**config_options(output_dir, **options)),
        train_dataset=pairs() if train is None else train,
        eval_dataset=evaluation,
    )


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
            start(tmp_path, train=data, per_device_train_batch_size=1)
        with pytest.raises(ValueError, match=f"eval_dataset has {message}"):
            start(tmp_path, evaluation=data)
        with pytest.raises(ValueError, match=rf"eval_dataset\['clean'\] has {message}"):
            start(tmp_path, evaluation={"clean": data})
    assert list(tmp_path.iterdir()) == []


def test_data_smaller_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"16 pairs, fewer than one global batch of 32"):
        start(tmp_path, gradient_accumulation_steps=8)


def test_output_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="output_dir"):
        start(tmp_path / "file" / "run")


def test_other_config_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a PopRiskDPOConfig, not DPOConfig"):
        PopRiskDPOTrainer("no/such-model", args=DPOConfig(**config_options(tmp_path)))
