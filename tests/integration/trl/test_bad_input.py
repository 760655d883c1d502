"""What cannot work is refused before anything is tokenized, loaded or written."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig

from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer
from tests.helpers.trl_versions import needs_trl

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


def test_output_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="output_dir"):
        start(tmp_path / "file" / "run")


def test_other_config_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a PopRiskDPOConfig, not DPOConfig"):
        PopRiskDPOTrainer("no/such-model", args=DPOConfig(**config_options(tmp_path)))


def test_ids_and_weights_are_checked_first(tmp_path: Path) -> None:
    data = pairs().add_column("id", ["same"] * 16).add_column("w", [-1.0] * 16)
    with pytest.raises(ValueError, match="Rows 0 and 1 have the same id 'same'"):
        start(tmp_path, train=data, pair_id_column="id")
    with pytest.raises(ValueError, match=r"Row 0 has -1.0; weights must be finite and >= 0"):
        start(tmp_path, train=data, pair_weight_column="w")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_id_column": "id"}, "pair_id_column: 'id'. It needs map-style"),
        ({"pair_weight_column": "w"}, "pair_weight_column: 'w'. It needs map-style"),
        ({"noise": "rdpo"}, "noise_rate: None. With noise='rdpo' it is estimated from map-style"),
    ],
)
def test_streamed_data(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path, train=pairs().to_iterable_dataset(), **options)


def test_reference_with_another_vocabulary(tmp_path: Path) -> None:
    other = tiny_model()
    other.resize_token_embeddings(32)
    with pytest.raises(ValueError, match="its vocabulary has 32 tokens, that of the model 15"):
        PopRiskDPOTrainer(
            tiny_model(),
            other,
            PopRiskDPOConfig(**config_options(tmp_path)),
            train_dataset=pairs(),
            processing_class=tiny_tokenizer(),
        )


@needs_trl("1.9", "filter for prompts that fill max_length")
def test_dropped_pairs_and_short_epochs_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*pairs(12)]
    rows[3]["prompt"] = " ".join(["ash"] * 30)
    PopRiskDPOTrainer(
        tiny_model(),
        tiny_model(),
        PopRiskDPOConfig(**config_options(tmp_path, max_length=24, max_steps=1)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    ).train()
    assert "1 of 12 training pairs were dropped: their prompts alone fill max_length" in caplog.text
    assert "One epoch of 12 pairs has fewer than 4 optimizer steps (batches of 4)" in caplog.text


@needs_trl("1.9", "precomputation for a model in memory")
def test_sampling_without_a_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on_policy_kl_samples: 4. With precompute_ref_log_probs"):
        PopRiskDPOTrainer(
            tiny_model(),
            None,
            PopRiskDPOConfig(
                **config_options(tmp_path, precompute_ref_log_probs=True, on_policy_kl_samples=4)
            ),
            train_dataset=pairs(),
            processing_class=tiny_tokenizer(),
        )
