"""What people do with trl.DPOTrainer by public reports, done with ours beside it.

Each test names the report. Where TRL trains, ours with `noise="off"` must give the same numbers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.cli.main import main
from poprisk_integrations.trl import PopRiskDPOTrainer
from tests.helpers.tiny_dpo import (
    config_options,
    dpo_trainer,
    pairs,
    save_model,
    tiny_model,
    upstream_numbers,
)

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LORA = LoraConfig(r=4, target_modules=["v_proj", "o_proj"])


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(output_dir: Path, train: Any = None, **options: Any) -> Any:
    return dpo_trainer(
        output_dir, train, **{"ref_model": 1, "max_steps": 2, "stop": False, **options}
    )


def assert_same_as_trl(
    tmp_path: Path,
    train: Any,
    evaluation: Any = None,
    *,
    make_model: Any = tiny_model,
    make_reference: Any = lambda: tiny_model(1),
    **options: Any,
) -> Any:
    """Train both on the same data, and compare logs and weights bit for bit."""
    trainers = []
    for name, extra in (
        ("theirs", {"kind": DPOTrainer, "config": DPOConfig}),
        ("ours", {"noise": "off", "stop": False}),
    ):
        trainer = dpo_trainer(
            tmp_path / name,
            train,
            evaluation,
            model=make_model(),
            ref_model=make_reference(),
            **{"max_steps": 2, "optim": "adamw_torch", **options, **extra},
        )
        trainer.train()
        if evaluation is not None:
            trainer.evaluate()
        trainers.append(trainer)
    theirs, ours = trainers
    assert upstream_numbers(ours) == upstream_numbers(theirs)
    assert len(theirs.state.log_history) > 2
    expected = theirs.model.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in ours.model.state_dict().items())
    return ours


def assert_kl_is_that_of_trls_rewards(line: dict[str, float], beta: float, **close: float) -> None:
    rewards = (line["rewards/chosen"] + line["rewards/rejected"]) / 2
    assert line["poprisk/kl_data"] == pytest.approx(rewards / beta, **(close or {"abs": 1e-5}))


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "ash bay", "chosen": " cat dew", "rejected": " elm", **columns}


TRAINS_IN_TRL = {
    "two pairs, batch of eight": (lambda: pairs(2), {"per_device_train_batch_size": 8}),
    "pairs without a preference": (
        lambda: Dataset.from_list(
            [row(), row(rejected=" cat dew"), row(rejected=""), row(prompt="ash", chosen=" ")] * 2
        ),
        {},
    ),
    "label smoothing with hinge": (pairs, {"loss_type": "hinge", "label_smoothing": 0.1}),
    "columns that collators do not know": (
        lambda: (
            pairs().add_column("id", [None] * 16).add_column("messages", [[1, "a"[:0]][:1]] * 16)
        ),
        {"remove_unused_columns": False},
    ),
}


@pytest.mark.parametrize("case", TRAINS_IN_TRL)
def test_off_refuses_nothing_that_trl_trains_on(tmp_path: Path, case: str) -> None:
    make, options = TRAINS_IN_TRL[case]
    assert_same_as_trl(tmp_path, make(), **options)


def test_a_reference_with_padded_embeddings(tmp_path: Path) -> None:
    # allenai/open-instruct#355: one of the two models has its embeddings resized.
    def padded() -> Any:
        model = tiny_model(1)
        model.resize_token_embeddings(32)
        return model

    assert_same_as_trl(tmp_path, pairs(), make_reference=padded)


def test_an_evaluation_set_of_a_dict_with_precomputed_references(tmp_path: Path) -> None:
    # huggingface/trl#6370, #1107
    sets = DatasetDict({"a": pairs(4, seed=1), "b": pairs(4, seed=2)})
    assert_same_as_trl(tmp_path, pairs(), sets, precompute_ref_log_probs=True)


def test_a_trained_adapter_is_its_own_reference(tmp_path: Path) -> None:
    # huggingface/trl#1193, #6591: the reference of a loaded adapter is a copy of it, not the base.
    def adapted() -> Any:
        torch.manual_seed(3)
        model = get_peft_model(tiny_model(), LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    ours = assert_same_as_trl(
        tmp_path, pairs(), make_model=adapted, make_reference=lambda: None, beta=0.5
    )
    first, second = [line for line in ours.state.log_history if "loss" in line]
    assert first["poprisk/margin_p50"] == pytest.approx(0, abs=1e-6)
    for line in (first, second):
        assert_kl_is_that_of_trls_rewards(line, 0.5)
    assert abs(second["poprisk/kl_data"]) > 1e-6


def test_modules_to_save_beside_the_adapter(tmp_path: Path) -> None:
    # huggingface/peft#1689: with trained embeddings the reference is still the model before.
    lora = LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["embed_tokens"])
    options = {"make_reference": lambda: None, "learning_rate": 0.1}
    ours = assert_same_as_trl(tmp_path, pairs(), peft_config=lora, **options)
    line = [line for line in ours.state.log_history if "loss" in line][1]
    assert_kl_is_that_of_trls_rewards(line, 0.1, abs=1e-4)
    assert abs(line["poprisk/kl_data"]) > 1e-2


def test_an_adapter_with_a_reference_of_its_own(tmp_path: Path) -> None:
    # huggingface/trl#1365
    ours = assert_same_as_trl(tmp_path, pairs(), peft_config=LORA)
    line = next(line for line in ours.state.log_history if "loss" in line)
    assert_kl_is_that_of_trls_rewards(line, 0.1, abs=1e-4)


def test_a_merged_adapter_is_saved_after_training(tmp_path: Path) -> None:
    trainer = build(tmp_path, peft_config=LORA, ref_model=None, learning_rate=0.05)
    trainer.train()
    trainer.model.merge_adapter()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


class Prepared(PopRiskDPOTrainer):
    """oumi-ai/oumi#1922: data come tokenized, so preparation is overridden."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


def test_data_that_are_tokenized_already(tmp_path: Path) -> None:
    ids = build(tmp_path).train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    trainer = build(tmp_path, ids, kind=Prepared, noise="cdpo", noise_rate=0.2, max_steps=4)
    trainer.train()
    assert trainer.flip_report().to_pandas()["margin"].notna().all()


def test_copies_and_pairs_labelled_both_ways_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # vl-rewardbench/VL_RewardBench#7, alipay/VCSL#13: one pair of texts, two labels.
    turned = [
        row(chosen=r["rejected"], rejected=r["chosen"]) | {"prompt": r["prompt"]} for r in pairs(3)
    ]
    data = Dataset.from_list([*pairs(8), *pairs(5), *turned])
    build(tmp_path, data)
    for line in (
        "train_dataset: 5 of 16 pairs: the same pair and label as an earlier row (rows 8, 9, ",
        "train_dataset: 3 of 16 pairs: labelled the other way in an earlier row (rows 13, 14, 15)",
    ):
        assert [record.message.startswith(line) for record in caplog.records].count(True) == 1


def test_the_command_line_checks_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**r, "id": f"s{n}" if n % 2 else n} for n, r in enumerate(pairs(7))]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, [*rows, row(rejected=" cat dew", id=7)])))
    keys = {"model_name_or_path": save_model(tmp_path / "model"), "dataset_name": str(data)}
    options = {**config_options(tmp_path / "out", max_steps=1), "report_to": "none"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**options, **keys, "flip_rate": 0.5, "noise": "off"}))
    arguments = ["dpo", "--config", str(config)]
    assert main(arguments) == 0  # TRL trains on an identical pair, so does noise="off"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main([*arguments, "--pair_id_column", "id", "--output_dir", str(tmp_path / "x")]) == 2
    assert "Row 0 has 0 and row 1 has 's1'; ids must be all text or" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_directory_that_cannot_be_written_and_need_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    build(tmp_path)  # save_strategy="no": TRL trains
    assert "no permission to write" in caplog.text
    with pytest.raises(PermissionError, match="no permission to write"):
        build(tmp_path, save_strategy="steps")


def test_saved_and_evaluated_before_training_and_trained_twice(tmp_path: Path) -> None:
    # mosaicml/composer#138: a trainer is used more than once.
    known = {"noise": "cdpo", "noise_rate": 0.2, "max_steps": 4, "stop": True, "stop_window": 4}
    trainer = build(tmp_path, evaluation=pairs(4, seed=1), **known)
    assert trainer.evaluate()["eval_poprisk/margin_p50"] != 0
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "flip_report.csv").exists()
    trainer.train()
    first = trainer.flip_report().to_pandas()
    assert first["margin"].notna().all()
    trainer.train()
    assert trainer.state.global_step == 4
    # The second run trains on pairs that it has seen: their margins are still those from before.
    assert trainer.flip_report().to_pandas().equals(first)


def test_a_collator_that_is_replaced_later_loses_no_weight_in_silence(tmp_path: Path) -> None:
    data = pairs().add_column("weight", [0.5] * 16)
    trainer = build(tmp_path, data, pair_weight_column="weight")
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(ValueError, match=r"pair_weight_column: 'weight'\. A batch has no weights"):
        trainer.train()
