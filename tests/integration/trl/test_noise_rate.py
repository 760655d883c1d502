"""Ids, the estimate, the flip report and the last line of a run on labels that are partly wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from poprisk_integrations.core.ranking_auc import ranking_auc
from poprisk_integrations.huggingface.log_metrics import for_the_console
from poprisk_integrations.trl import (
    FlipReport,
    PopRiskDPOConfig,
    PopRiskDPOTrainer,
    cross_fit_flip_report,
)
from poprisk_integrations.trl.label_flips import flip_preferences
from tests.helpers.tiny_dpo import config_options, easy_pairs, pairs, tiny_model, tiny_tokenizer
from tests.helpers.trl_versions import needs_trl

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def noisy(count: int = 320, rate: float = 0.25) -> tuple[Dataset, list[int]]:
    data, rows = flip_preferences(easy_pairs(count), rate, seed=1)
    return data.add_column("id", [f"pair-{row}" for row in range(count)]), rows


def noise_file(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "poprisk_noise.json").read_text())
    return found


def build(
    tmp_path: Path, data: Dataset, eval_dataset: Any = None, callbacks: Any = None, **options: Any
) -> PopRiskDPOTrainer:
    settings = {
        "stop": False,
        "max_steps": 60,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "optim": "adamw_torch",
    }
    return PopRiskDPOTrainer(
        tiny_model(),
        ref_model=tiny_model(),
        args=PopRiskDPOConfig(
            **config_options(tmp_path, **{**settings, "logging_steps": 8, **options})
        ),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


class Margins(TrainerCallback):
    """Every pair's margin under the present model, before each step."""

    def __init__(self) -> None:
        self.at_step: dict[int, np.ndarray] = {}
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, reference = self.trainer.model, tiny_model()
        found = {}
        data = self.trainer.train_dataset
        with torch.no_grad():
            for row in range(len(data)):
                collated = self.trainer.data_collator([data[row]])
                ratios = []
                for m in (model, reference):
                    logits = m(collated["input_ids"], attention_mask=collated["attention_mask"])
                    tokens = (
                        logits.logits.double()
                        .log_softmax(-1)[:, :-1]
                        .gather(-1, collated["input_ids"][:, 1:, None])
                        .squeeze(-1)
                    )
                    ratios.append((tokens * collated["completion_mask"][:, 1:]).sum(1))
                chosen, rejected = (ratios[0] - ratios[1]).tolist()
                found[int(collated["poprisk_row"])] = args.beta * (chosen - rejected)
        self.at_step[state.global_step] = found


@needs_trl("1.9", "filter for prompts that fill max_length")
def test_margins_are_those_before_the_pair_was_trained_on(tmp_path: Path) -> None:
    # Two long prompts are dropped, so places in the prepared data are not rows.
    rows = [*pairs(12)]
    for place in (3, 8):
        rows[place]["prompt"] = " ".join(["ash"] * 30)
    data = Dataset.from_list(rows).add_column("id", list(range(100, 112)))
    margins = Margins()
    trainer = build(
        tmp_path, data, callbacks=[margins], max_steps=9, max_length=24, pair_id_column="id",
        per_device_train_batch_size=2,
    )  # fmt: skip
    margins.trainer = trainer
    trainer.train()
    record = trainer._noise.margins
    assert record.seen.tolist() == [row not in (3, 8) for row in range(12)]
    for row in range(12):
        if row in (3, 8):
            continue
        step = int(record.step[row])
        assert 0 <= step < 5  # an epoch has five steps; later sights do not count
        assert record.margin[row].item() == pytest.approx(margins.at_step[step][row], abs=1e-5)
    assert len(set(record.step.tolist())) == 6
    assert record.margin.nan_to_num().abs().max() > 1e-3


def test_report_estimate_and_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, flipped = noisy()
    trainer = build(tmp_path, data, pair_id_column="id")
    with pytest.raises(ValueError, match="No flip report yet"):
        trainer.flip_report()
    trainer.train()
    report = trainer.flip_report()
    assert len(report) == 320
    table = report.to_pandas()
    judged = table[table["probability_wrong"].notna()]
    wrong = torch.tensor(judged["row"].isin(flipped).to_numpy())
    assert ranking_auc(torch.tensor(judged["probability_wrong"].to_numpy()), wrong) > 0.75
    assert table["pair_id"].tolist() == [f"pair-{row}" for row in table["row"]]
    # The first batch was seen by the reference itself: its margins of zero judge nothing.
    first = table[table["step"] == 0]
    assert len(first) == 8
    assert set(first["action"]) == {"not_judged"}
    assert set(table["row"][-8:]) == set(first["row"])
    assert report.summary()["num_not_judged"] == noise_file(tmp_path)["num_not_judged"] == 8
    # The first words of the most suspect pairs, as they were trained on.
    assert (table["chosen"] != "").sum() == 20
    top = table.iloc[0]
    assert top["chosen"] == data[int(top["row"])]["chosen"].strip()
    noise = noise_file(tmp_path)
    assert noise["low"] <= 0.25 <= noise["high"]
    assert noise["rate"] == pytest.approx(0.25, abs=0.12)
    assert noise["estimated_at_step"] == 40
    assert noise["num_pairs"] == 312
    # Both files, with ids as they were.
    pd.testing.assert_frame_equal(FlipReport.load(tmp_path).to_pandas(), table)
    assert (tmp_path / "flip_report.csv").exists()

    logged = trainer.state.log_history
    first, last = logged[0], [line for line in logged if "loss" in line][-1]
    assert first["poprisk/reward_accuracy"] >= first["rewards/accuracies"]
    assert "poprisk/noise_rate" not in first
    assert last["poprisk/noise_rate"] == noise["rate"]
    assert last["poprisk/flips_suspected"] == (table["probability_wrong"] >= 0.5).sum()
    assert last["poprisk/margin_p50_suspect"] < last["poprisk/margin_p50_clean"]
    assert 0 <= last["poprisk/flips_fitted"] <= 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"poprisk: {noise['diagnosis']}"
    assert "of the labels look wrong" in line
    assert "suspect pairs, " in line


def test_the_loss_changes_after_half_an_epoch(tmp_path: Path) -> None:
    data, _ = noisy(count=400, rate=0.25)
    trainer = build(tmp_path, data, noise="rdpo", max_steps=26, logging_steps=1)  # of 50
    trainer.train()
    noise = noise_file(tmp_path)
    assert (noise["loss"], noise["estimated_at_step"]) == ("rdpo", 25)
    assert noise["rate_in_use"] == pytest.approx(min(noise["rate"], 0.35))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
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
    assert {"swap", "drop"}.isdisjoint(judged["action"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("poprisk: the margins do not tell how many labels are wrong (0 to ")
    assert "no noise rate for noise='rdpo': the loss is DPO's" in line


def test_report_goes_beside_a_saved_model(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", noisy()[0], max_steps=24)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert {"model.safetensors", "flip_report.csv", "flip_report.parquet"} <= {
        path.name for path in (tmp_path / "model").iterdir()
    }


def test_a_given_rate_needs_no_estimate(tmp_path: Path) -> None:
    data, _ = noisy(count=24)
    trainer = build(tmp_path, data, noise="rdpo", noise_rate=0.3, max_steps=6)
    with pytest.raises(ValueError, match="No flip report yet"):
        trainer.flip_report()
    trainer.train()
    table = trainer.flip_report().to_pandas()
    margins = table["margin"].to_numpy()
    expected = np.where(table["step"] > 0, 0.3 / (0.3 + 0.7 * np.exp(margins)), np.nan)
    np.testing.assert_allclose(table["probability_wrong"], expected, rtol=1e-9)
    assert np.ptp(margins) > 0
    assert json.loads((tmp_path / "poprisk_noise.json").read_text())["rate_in_use"] == 0.3


class Interrupt(TrainerCallback):
    """Stands for a killed process: the run ends right after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("step", [13, 50], ids=["first epoch", "second epoch"])
def test_resume_is_bitwise(tmp_path: Path, step: int) -> None:
    data, _ = noisy()
    options = {"noise": "rdpo", "save_strategy": "steps", "save_steps": 60}
    whole = build(tmp_path / "whole", data, **options)
    whole.train()
    cut = tmp_path / "cut"
    build(cut, data, callbacks=[Interrupt(step)], **options).train()
    resumed = build(cut, data, **options)
    resumed.train(resume_from_checkpoint=str(cut / f"checkpoint-{step}"))
    assert whole._noise.estimate == resumed._noise.estimate
    assert whole._noise.loss == resumed._noise.loss
    assert whole._noise.loss.mode == "rdpo"
    pd.testing.assert_frame_equal(
        whole.flip_report().to_pandas(), resumed.flip_report().to_pandas()
    )
    weights = [
        load_file(tmp_path / name / "checkpoint-60" / "model.safetensors")
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resume_without_the_record_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = noisy()
    options = {"save_strategy": "steps", "save_steps": 60}
    build(tmp_path, data, callbacks=[Interrupt(13)], **options).train()
    (tmp_path / "checkpoint-13" / "poprisk_labels.safetensors").unlink()
    resumed = build(tmp_path, data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert "which pairs were trained on is not known" in caplog.text
    assert resumed._noise.estimate is None
    assert "noise rate not estimated" in json.dumps(
        json.loads((tmp_path / "poprisk_noise.json").read_text())
    )


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
    wrong = torch.tensor(table["row"].isin(flipped).to_numpy())
    assert ranking_auc(torch.tensor(table["probability_wrong"].to_numpy()), wrong) > 0.75
    assert estimate.low <= 0.25 <= estimate.high
    for folds in (1, 129):
        with pytest.raises(ValueError, match=f"folds: {folds}"):
            cross_fit_flip_report(make, data, folds=folds)


def test_on_policy_kl(tmp_path: Path) -> None:
    data, _ = noisy()
    trainer = build(tmp_path, data, on_policy_kl_samples=8, max_steps=24, eval_dataset=pairs(8))
    state = torch.get_rng_state()
    assert trainer.on_policy_kl(max_new_tokens=8) == 0.0  # the policy is the reference
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()
    values = [line["poprisk/kl_on_policy"] for line in trainer.state.log_history if "poprisk/kl_on_policy" in line]  # noqa: E501  # fmt: skip
    assert len(values) == 1
    assert values[0] > 0.01
    assert trainer.evaluate()["eval_poprisk/kl_on_policy"] == pytest.approx(values[0])
