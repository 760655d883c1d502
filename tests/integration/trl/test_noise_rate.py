"""Ids, the estimate, the flip report and the last line of a run on labels that are partly wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback

from poprisk_integrations.huggingface.run_callback import for_the_console
from poprisk_integrations.trl import FlipReport, PopRiskDPOTrainer, cross_fit_flip_report
from poprisk_integrations.trl.label_flips import flip_preferences
from tests.helpers.tiny_dpo import (
    Interrupt,
    dpo_trainer,
    easy_pairs,
    losses_of,
    needs_trl,
    pairs,
    sequence_log_probs,
    tiny_model,
)


def noisy(count: int = 320, rate: float = 0.25) -> tuple[Dataset, list[int]]:
    data, rows = flip_preferences(easy_pairs(count), rate, seed=1)
    return data.add_column("id", [f"pair-{row}" for row in range(count)]), rows


def noise_file(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "poprisk_noise.json").read_text())
    return found


def build(tmp_path: Path, data: Dataset, evaluation: Any = None, **options: Any) -> Any:
    settings = {
        "stop": False, "max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8,
        "optim": "adamw_torch", "logging_steps": 8,
    }  # fmt: skip
    return dpo_trainer(tmp_path, data, evaluation, **{**settings, **options})


class Margins(TrainerCallback):
    """Every pair's margin under the present model, before each step."""

    def __init__(self) -> None:
        self.at_step: dict[int, dict[int, float]] = {}
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {}
        with torch.no_grad():
            for row in self.trainer.train_dataset:
                batch = self.trainer.data_collator([row])
                policy = sequence_log_probs(self.trainer.model, batch)
                chosen, rejected = (policy - sequence_log_probs(tiny_model(), batch)).tolist()
                found[int(batch["poprisk_row"])] = args.beta * (chosen - rejected)
        self.at_step[state.global_step] = found


@needs_trl("1.9", "filter for prompts that fill max_length")
def test_margins_are_those_before_the_pair_was_trained_on(tmp_path: Path) -> None:
    # Two long prompts are dropped, so places in the prepared data are not rows.
    rows = [*pairs(12)]
    for place in (3, 8):
        rows[place]["prompt"] = " ".join(["ash"] * 30)
    margins = Margins()
    trainer = build(
        tmp_path, Dataset.from_list(rows), callbacks=[margins], max_steps=9, max_length=24,
        per_device_train_batch_size=2, noise="cdpo", noise_rate=0.2,
    )  # fmt: skip
    margins.trainer = trainer
    trainer.train()
    table = trainer.flip_report().to_pandas()
    assert set(table["row"][table["action"] == "too_long"]) == {3, 8}
    table = table[table["action"] != "too_long"]
    assert len(table) == 10
    for row, step, margin in zip(table["row"], table["step"], table["margin"], strict=True):
        assert 0 <= step < 5  # an epoch has five steps; later sights do not count
        assert margin == pytest.approx(margins.at_step[step][row], abs=1e-5)
    assert table["step"].nunique() == 5
    assert table["margin"].abs().max() > 1e-3


def test_report_estimate_and_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, flipped = noisy()
    trainer = build(tmp_path, data, pair_id_column="id")
    with pytest.raises(ValueError, match="No flip report yet"):
        trainer.flip_report()
    trainer.train()
    line = capsys.readouterr().err.splitlines()[-1]
    report = trainer.flip_report()
    table = report.to_pandas()
    assert len(table) == 320
    judged = table[table["probability_wrong"].notna()]
    assert roc_auc_score(judged["row"].isin(flipped), judged["probability_wrong"]) > 0.75
    assert table["pair_id"].tolist() == [f"pair-{row}" for row in table["row"]]
    # The first batch was seen by the reference itself: its margins of zero judge nothing.
    first = table[table["step"] == 0]
    assert len(first) == 8
    assert set(first["action"]) == {"not_judged"}
    assert set(table["row"][-8:]) == set(first["row"])
    # The first words of the most suspect pairs, as they were trained on.
    assert (table["chosen"] != "").sum() == 20
    top = table.iloc[0]
    assert top["chosen"] == data[int(top["row"])]["chosen"].strip()
    noise = noise_file(tmp_path)
    assert report.summary()["num_not_judged"] == noise["num_not_judged"] == 8
    assert noise["low"] <= 0.25 <= noise["high"]
    assert noise["rate"] == pytest.approx(0.25, abs=0.12)
    assert (noise["estimated_at_step"], noise["num_pairs"]) == (40, 312)
    # Both files, with ids as they were; and again beside a model that is saved.
    trainer.save_model(str(tmp_path / "model"))
    for folder in (tmp_path, tmp_path / "model"):
        pd.testing.assert_frame_equal(FlipReport.load(folder).to_pandas(), table)
        assert (folder / "flip_report.csv").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()

    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["poprisk/reward_accuracy"] >= lines[0]["rewards/accuracies"]
    assert "poprisk/noise_rate" not in lines[0]
    last = lines[-1]
    assert last["poprisk/noise_rate"] == noise["rate"]
    assert last["poprisk/flips_suspected"] == (table["probability_wrong"] >= 0.5).sum()
    assert last["poprisk/margin_p50_suspect"] < last["poprisk/margin_p50_clean"]
    assert 0 <= last["poprisk/flips_fitted"] <= 1
    assert line == f"poprisk: {noise['diagnosis']}"
    assert "of the labels look wrong" in line
    assert "suspect pairs, " in line


def test_the_loss_changes_after_half_an_epoch(tmp_path: Path) -> None:
    trainer = build(tmp_path, noisy(400)[0], noise="rdpo", max_steps=26, logging_steps=1)  # of 50
    trainer.train()
    noise = noise_file(tmp_path)
    assert (noise["loss"], noise["estimated_at_step"]) == ("rdpo", 25)
    assert noise["rate_in_use"] == pytest.approx(min(noise["rate"], 0.35))
    losses = losses_of(trainer)
    assert losses[-1] < losses[-2] - 0.05  # the push: minus e / (1 - 2e) times the mean margin


def test_a_model_that_has_hardly_learned_ranks_and_names_no_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(tmp_path, pairs(128), noise="rdpo", max_steps=16, learning_rate=1e-3)
    trainer.train()
    noise = noise_file(tmp_path)
    assert (noise["rate"], noise["low"], noise["loss"]) == (None, 0.0, "off")
    assert noise["high"] > 0.3
    logged = [line for line in trainer.state.log_history if "poprisk/noise_rate" in line][-1]
    assert 0 <= logged["poprisk/noise_rate"] <= logged["poprisk/noise_rate_high"]
    assert "poprisk/noise_rate" not in for_the_console(logged)
    assert logged["poprisk/noise_rate_low"] == logged["poprisk/flips_suspected"] == 0.0
    report = FlipReport.load(tmp_path)
    assert not report.calibrated
    judged = report.to_pandas().dropna(subset="probability_wrong")
    assert judged["margin"].is_monotonic_increasing
    assert judged["probability_wrong"].nunique() > 50
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("poprisk: the margins do not tell how many labels are wrong (0 to ")
    assert "no noise rate for noise='rdpo': the loss is DPO's" in line


def test_a_given_rate_needs_no_estimate(tmp_path: Path) -> None:
    trainer = build(tmp_path, noisy(24)[0], noise="rdpo", noise_rate=0.3, max_steps=6)
    with pytest.raises(ValueError, match="No flip report yet"):
        trainer.flip_report()
    trainer.train()
    table = trainer.flip_report().to_pandas()
    margins = table["margin"].to_numpy()
    expected = np.where(table["step"] > 0, 0.3 / (0.3 + 0.7 * np.exp(margins)), np.nan)
    np.testing.assert_allclose(table["probability_wrong"], expected, rtol=1e-9)
    assert np.ptp(margins) > 0
    assert noise_file(tmp_path)["rate_in_use"] == 0.3


SAVING = {"save_strategy": "steps", "save_steps": 60}


def test_resume_without_the_record_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = noisy()
    build(tmp_path, data, callbacks=[Interrupt(13)], **SAVING).train()
    (tmp_path / "checkpoint-13" / "poprisk_labels.safetensors").unlink()
    resumed = build(tmp_path, data, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert "which pairs were trained on is not known" in caplog.text
    assert noise_file(tmp_path)["rate"] is None
    assert "noise rate not estimated" in noise_file(tmp_path)["diagnosis"]


def test_cross_fit_judges_every_pair_with_a_model_that_never_saw_it(tmp_path: Path) -> None:
    data, flipped = noisy(count=128)
    trained: list[set[str]] = []
    judged: list[set[str]] = []

    def make(train: Dataset, held_out: Dataset) -> PopRiskDPOTrainer:
        trained.append(set(train["id"]))
        judged.append(set(held_out["id"]))
        folder = tmp_path / str(len(trained))
        return build(folder, train, held_out, max_steps=32, noise="off")

    report, estimate = cross_fit_flip_report(make, data, pair_id_column="id")
    assert not trained[0] & judged[0]
    assert not trained[1] & judged[1]
    assert judged[0] | judged[1] == set(data["id"])
    table = report.to_pandas()
    assert table["margin"].notna().all()
    assert roc_auc_score(table["row"].isin(flipped), table["probability_wrong"]) > 0.75
    assert estimate.low <= 0.25 <= estimate.high
    for folds in (1, 129):
        with pytest.raises(ValueError, match=f"folds: {folds}"):
            cross_fit_flip_report(make, data, folds=folds)


def test_on_policy_kl(tmp_path: Path) -> None:
    trainer = build(tmp_path, noisy()[0], pairs(8), on_policy_kl_samples=8, max_steps=24)
    state = torch.get_rng_state()
    assert trainer.on_policy_kl(max_new_tokens=8) == 0.0  # the policy is the reference
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()
    name = "poprisk/kl_on_policy"
    (value,) = [line[name] for line in trainer.state.log_history if name in line]
    assert value > 0.01
    assert trainer.evaluate()[f"eval_{name}"] == pytest.approx(value)
