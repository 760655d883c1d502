"""Reward models: TRL's numbers bit for bit, margins, noise rate, flip report and stop."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.trl import (
    FlipReport,
    PopRiskRewardConfig,
    PopRiskRewardTrainer,
    cross_fit_flip_report,
)
from poprisk_integrations.trl.label_flips import flip_preferences
from tests.helpers.tiny_dpo import Interrupt, easy_pairs, losses_of, pairs, upstream_numbers
from tests.helpers.tiny_dpo import weights_of as weights
from tests.helpers.tiny_reward import reward_trainer, rewards

TRAINER = "poprisk_integrations.trl.poprisk_reward_trainer"
BLIND = SimpleNamespace(policy_output=None)
OFF: dict[str, Any] = {"optim": "adamw_torch", "noise": "off"}
LEARNS: dict[str, Any] = {
    "optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 8,
    "logging_steps": 8, "max_steps": 48, "stop": False,
}  # fmt: skip
SIGNAL = {
    "max_steps": 20, "stop_criterion": "signal", "stop_window": 4, "stop_action": "monitor",
    "learning_rate": 3e-3, "noise_rate": 0.2,
}  # fmt: skip
RISK = {"stop_criterion": "risk", "stop_sit_out": 0.5, "max_steps": -1, "num_train_epochs": 3}


def with_margins(data: Dataset) -> Dataset:
    """TRL's column `margin`: by how much a pair is to be told apart."""
    return data.add_column("margin", [0.1 * (row % 5) for row in range(len(data))])


def noisy(count: int = 320, rate: float = 0.25) -> tuple[Dataset, list[int]]:
    data, rows = flip_preferences(easy_pairs(count), rate, seed=1)
    return data.add_column("id", [f"pair-{row}" for row in range(count)]), rows


def stop_of(trainer: Any) -> PopRiskEarlyStoppingCallback:
    found: PopRiskEarlyStoppingCallback = next(
        c for c in trainer.callback_handler.callbacks if isinstance(c, PopRiskEarlyStoppingCallback)
    )
    return found


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft": True},
    "accumulation, evaluation": {
        "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
    },
    "margins, centred": {
        "train": with_margins(pairs(32)), "center_rewards_coefficient": 0.01, "bf16": True,
        "gradient_checkpointing": True,
    },
}  # fmt: skip


def build(folder: Path, *, peft: bool = False, **options: Any) -> Any:
    """In one epoch, where nobody sits out."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    defaults = {"train": pairs(32), "max_steps": -1, "num_train_epochs": 1, "optim": "adamw_torch"}
    return reward_trainer(
        folder, evaluation=pairs(8, seed=1), peft_config=lora if peft else None,
        **{**defaults, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in ("full", "lora"))) for c in CASES]
)
def test_log_and_weights_are_those_of_trl(tmp_path: Path, case: str) -> None:
    theirs = build(tmp_path, kind=RewardTrainer, config=RewardConfig, **CASES[case])
    theirs.train()
    expected = theirs.model.state_dict()
    for stop in ({"stop": False}, {"stop_criterion": "risk"}):
        mine = build(tmp_path, noise="off", **stop, **CASES[case])
        mine.train()
        assert upstream_numbers(mine) == upstream_numbers(theirs)
        found = mine.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any("poprisk/margin_p50" in line for line in mine.state.log_history)
    assert not torch.equal(weights(theirs), weights(build(tmp_path, **CASES[case])))
    rows = stop_of(mine).history
    assert 0.0 <= rows[-1]["estimated_test_reward_accuracy"] <= 1.0
    assert ("eval_poprisk/margin_p50" in str(mine.state.log_history)) == ("eval" in case)


@pytest.mark.parametrize("centred", [None, 0.1])
@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_of_each_pair_is_the_one_that_is_trained_on(
    tmp_path: Path, margin: bool, centred: float | None
) -> None:
    data = with_margins(pairs(16)) if margin else pairs(16)
    trainer = build(tmp_path, train=data, center_rewards_coefficient=centred)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    values = trainer.example_values()
    assert loss.requires_grad
    assert values["loss"].shape == (4,)
    assert not values["loss"].requires_grad
    assert float(values["loss"].mean()) == pytest.approx(float(loss.detach()), abs=1e-6)
    prepared = trainer.train_dataset.select(batch["poprisk_row"].tolist())
    expected = rewards(trainer, prepared)
    found = values["reward_margin"]
    torch.testing.assert_close(found, expected[:, 0] - expected[:, 1], atol=1e-5, rtol=0)
    assert torch.equal(values["reward_accuracy"], (found > 0).float())


def test_a_model_that_stands_still(tmp_path: Path) -> None:
    """Estimates and report are those of all pairs: of those that sit out, too."""
    trainer = build(tmp_path, train=easy_pairs(64), learning_rate=0.0, noise_rate=0.2, **RISK)
    trainer.train()
    expected = rewards(trainer, trainer.train_dataset)
    margins = expected[:, 0] - expected[:, 1]
    first = stop_of(trainer).history[0]
    for name, value in {
        "loss": -logsigmoid(margins).mean(),
        "reward_accuracy": (margins > 0).float().mean(),
        "reward_margin": margins.mean(),
    }.items():
        assert first[f"estimated_test_{name}"] == pytest.approx(float(value), abs=1e-5)
    table = trainer.flip_report().to_pandas().set_index("row").sort_index()
    assert table["margin"].tolist() == pytest.approx(margins.tolist(), abs=1e-5)
    assert table["step"].between(0, 16, inclusive="left").all()
    quantile = trainer.state.log_history[-2]["poprisk/margin_p50"]
    assert float(margins.min()) < quantile < float(margins.max())
    assert "compute_loss" not in vars(trainer)
    assert not trainer.model._forward_hooks


def test_report_estimate_and_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, flipped = noisy()
    trainer = reward_trainer(tmp_path, data, pair_id_column="id", **LEARNS)
    with pytest.raises(ValueError, match="No flip report yet"):
        trainer.flip_report()
    trainer.train()
    line = capsys.readouterr().err.splitlines()[-1]
    noise = json_of(tmp_path / "poprisk_noise.json")
    assert line == f"poprisk: {noise['diagnosis']}"
    assert "of the labels look wrong" in line
    assert noise["low"] <= 0.25 <= noise["high"]
    assert noise["rate"] == pytest.approx(0.25, abs=0.1)
    assert (noise["loss"], noise["estimated_at_step"]) == ("off", 40)
    table = trainer.flip_report().to_pandas()
    assert table["pair_id"].tolist() == [f"pair-{row}" for row in table["row"]]
    assert table["chosen"].iloc[0] == data[int(table["row"].iloc[0])]["chosen"].strip()
    judged = table[table["probability_wrong"].notna()]
    assert roc_auc_score(judged["row"].isin(flipped), judged["probability_wrong"]) > 0.9
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path, tmp_path / "model"):
        pd.testing.assert_frame_equal(FlipReport.load(folder).to_pandas(), table)
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert last["poprisk/noise_rate"] == noise["rate"]
    assert last["poprisk/flips_suspected"] == (table["probability_wrong"] >= 0.5).sum()
    assert last["poprisk/margin_p50_suspect"] < last["poprisk/margin_p50_clean"]
    assert "poprisk/kl_data" not in last


@pytest.mark.parametrize(
    ("data", "options", "cut"),
    [
        pytest.param(lambda: noisy()[0], LEARNS, 13, marks=pytest.mark.slow),
        (lambda: easy_pairs(64), {**OFF, **RISK, "stop_restore": "none"}, 21),
        (lambda: easy_pairs(64), SIGNAL, 7),
    ],
    ids=["noise rate, first epoch", "sitters, second epoch", "signal, gate"],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, data: Any, options: dict[str, Any], cut: int
) -> None:
    saves = {**options, "save_strategy": "steps", "save_steps": 1000, "logging_steps": 1}
    whole = reward_trainer(tmp_path / "whole", data(), **saves)
    whole.train()
    reward_trainer(tmp_path / "cut", data(), callbacks=[Interrupt(cut)], **saves).train()
    resumed = reward_trainer(tmp_path / "cut", data(), **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert whole.state.global_step == resumed.state.global_step > cut
    assert torch.equal(weights(whole), weights(resumed))
    assert losses_of(whole) == losses_of(resumed)
    reports = [trainer.flip_report().to_pandas() for trainer in (whole, resumed)]
    pd.testing.assert_frame_equal(*reports)
    folders = tmp_path / "whole", tmp_path / "cut"
    noise = [json_of(folder / "poprisk_noise.json") for folder in folders]
    assert noise[0] == noise[1]
    if options.get("stop", True):
        histories = [json_of(folder / "poprisk_stop.json")["history"] for folder in folders]
        assert len(histories[0]) >= 3
        for expected, row in zip(*histories, strict=True):
            for name in ("step", "signal_ratio", "estimated_test_loss"):
                assert row[name] == pytest.approx(expected[name], abs=1e-6)


def test_where_margins_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training is TRL's, and what there is not is said once."""
    theirs = build(tmp_path, kind=RewardTrainer, config=RewardConfig)
    theirs.train()
    monkeypatch.setattr(f"{TRAINER}.ForwardRecorder.__enter__", lambda self: BLIND)
    mine = build(tmp_path, noise="off")
    with caplog.at_level(logging.WARNING):
        mine.train()
    lines = [r.getMessage() for r in caplog.records if "Per-pair margins" in r.getMessage()]
    assert len(lines) == 1
    assert "poprisk/margin_* are not logged, and the noise rate is not estimated" in lines[0]
    assert upstream_numbers(mine) == upstream_numbers(theirs)
    assert torch.equal(weights(mine), weights(theirs))
    assert not any("poprisk/margin_p50" in line for line in mine.state.log_history)
    assert stop_of(mine).criterion_in_use == "signal"


def test_an_error_of_ours_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(f"{TRAINER}.batch_rewards", broken)
    trainer = build(tmp_path, stop=False)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.evaluate()["eval_loss"] > 0
    lines = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("the margins of a batch are not known")


def test_rewards_that_are_not_finite(tmp_path: Path) -> None:
    trainer = build(tmp_path, learning_rate=1e30, stop=False, noise_rate=0.2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert 0 < trainer.flip_report().to_pandas()["margin"].notna().sum() < 32


def test_cross_fit_judges_every_pair_with_a_model_that_never_saw_it(tmp_path: Path) -> None:
    data, flipped = noisy(count=128)
    judged: list[str] = []

    def make(train: Dataset, held_out: Dataset) -> PopRiskRewardTrainer:
        assert not set(train["id"]) & set(held_out["id"])
        judged.extend(held_out["id"])
        options = {**LEARNS, "max_steps": 24, "noise": "off"}
        trainer: PopRiskRewardTrainer = reward_trainer(
            tmp_path / str(len(judged)), train, held_out, **options
        )
        return trainer

    report, estimate = cross_fit_flip_report(make, data, pair_id_column="id")
    assert sorted(judged) == sorted(data["id"])
    table = report.to_pandas()
    assert table["margin"].notna().all()
    assert roc_auc_score(table["row"].isin(flipped), table["probability_wrong"]) > 0.75
    assert estimate.low <= 0.25 <= estimate.high


def test_what_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    same = pairs().map(lambda row: {**row, "rejected": row["chosen"]})
    for data, message in (
        (pairs().remove_columns("rejected"), "train_dataset has no column 'rejected'"),
        (same, "16 rows .first: row 0. whose chosen and rejected are the same"),
    ):
        with pytest.raises(ValueError, match=message):
            reward_trainer(tmp_path, data, model="no/such-model")
    with pytest.raises(ValueError, match="Invalid pair_id_column: 'id'"):
        reward_trainer(tmp_path, model="no/such-model", pair_id_column="id")
    with pytest.raises(TypeError, match="must be a PopRiskRewardConfig, not RewardConfig"):
        reward_trainer(tmp_path, model="no/such-model", config=RewardConfig)
    with pytest.raises(ValueError, match="streamed"):
        reward_trainer(
            tmp_path, pairs().to_iterable_dataset(), model="no/such-model", pair_id_column="prompt"
        )
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_tokenized_or_streamed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = build(tmp_path, kind=RewardTrainer, config=RewardConfig).train_dataset
    tokenized = prepared.select_columns(["chosen_ids", "rejected_ids"])
    trainer = reward_trainer(tmp_path, tokenized, noise_rate=0.2)
    trainer.train()
    assert trainer.flip_report().to_pandas()["margin"].notna().sum() == 24
    former = tokenized.rename_columns(
        {f"{x}_ids": f"{x}_input_ids" for x in ("chosen", "rejected")}
    )
    with pytest.warns(FutureWarning, match="legacy dataset columns"):
        reward_trainer(tmp_path, former)
    trainer = reward_trainer(tmp_path, pairs().to_iterable_dataset())
    trainer.train()
    assert trainer.state.global_step == 6
    assert "train_dataset is streamed: the noise rate is not estimated" in caplog.text


def test_pairs_that_are_too_long_are_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*pairs(12)]
    rows[3]["prompt"] = " ".join(["ash"] * 30)
    trainer = reward_trainer(tmp_path, Dataset.from_list(rows), max_length=24, noise_rate=0.2)
    assert "1 of 12 training pairs were dropped: they are longer than max_length" in caplog.text
    trainer.train()
    table = trainer.flip_report().to_pandas()
    assert table["row"][table["action"] == "too_long"].tolist() == [3]


def test_a_stop_of_the_users_takes_the_place_of_ours(tmp_path: Path) -> None:
    mine = PopRiskEarlyStoppingCallback(criterion="signal", window=4)
    trainer = reward_trainer(tmp_path)
    trainer.add_callback(mine)
    stops = [c for c in trainer.callback_handler.callbacks if type(c) is type(mine)]
    assert stops == [mine]
    assert type(trainer.args) is PopRiskRewardConfig
