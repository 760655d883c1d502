"""Pairs that sit out are measured, trained on later, and stand once in the flip report."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from tests.helpers.tiny_dpo import easy_pairs, pairs
from tests.integration.trl.test_same_as_trl import CASES
from tests.integration.trl.test_same_as_trl import build as build_case

RISK = {"stop_criterion": "risk", "stop_sit_out": 0.5}  # half of it in short runs
KNOWN = {"noise": "cdpo", "noise_rate": 0.2}  # flip reports without an estimate


def build(output_dir: Path, **options: Any) -> Any:
    return build_case(output_dir, **{"train": easy_pairs(96), "max_steps": -1, **options})


def stop_of(trainer: Any) -> PopRiskEarlyStoppingCallback:
    found: PopRiskEarlyStoppingCallback = next(
        c for c in trainer.callback_handler.callbacks if isinstance(c, PopRiskEarlyStoppingCallback)
    )
    return found


def recorded(trainer: Any) -> Any:
    """Margin and step of each row, before training on it."""
    return trainer.flip_report().to_pandas().set_index("row").sort_index()[["margin", "step"]]


def twin_margins(trainer: Any, beta: float = 0.1) -> torch.Tensor:
    """Margins of all pairs under the trainer's model and reference, one pair at a time."""
    found = []
    for row in trainer.train_dataset.with_format(None):
        scores = []
        for part in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[part]])
            ratio = 0.0
            for model, sign in ((trainer.model, 1.0), (trainer.ref_model, -1.0)):
                with torch.no_grad():
                    log_probs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
                places = torch.arange(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
                ratio += sign * float(log_probs[places, ids[0, places + 1]].sum())
            scores.append(ratio)
        found.append(beta * (scores[0] - scores[1]))
    return torch.tensor(found)


def test_estimates_of_a_model_that_stands_still_are_those_of_all_pairs(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, ref_model=1, num_train_epochs=3, learning_rate=0.0, noise="off", **RISK
    )
    trainer.train()
    margins = twin_margins(trainer)
    first = stop_of(trainer).history[0]
    expected = -float(logsigmoid(margins).mean())
    assert first["estimated_test_loss"] == pytest.approx(expected, abs=1e-5)
    accuracy = float((margins > 0).float().mean())
    assert 0.1 < accuracy < 0.9
    assert first["estimated_test_reward_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert first["estimated_test_reward_margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
    # Later windows rest on fewer pairs, corrected by what these lost in the first one.
    for row in stop_of(trainer).history[1:]:
        change = row["estimated_test_loss"] - first["estimated_test_loss"]
        assert abs(change) < 3 * row["estimated_test_loss_se"] < 0.1
    assert trainer.state.log_history[-1]["poprisk/estimated_test_reward_accuracy"] is not None
    # Every pair once in the flip report, whether it sat out or not, each with its own margin.
    assert recorded(trainer)["margin"].tolist() == pytest.approx(margins.tolist(), abs=1e-5)


def test_who_sits_out_is_first_seen_untrained_and_not_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    trainer = build(tmp_path, num_train_epochs=2, logging_steps=1, **RISK, **KNOWN)
    take = trainer._records.take

    def watched(mode: str) -> Any:
        ratios, rows = take(mode)
        if mode == "train":
            seen.append(rows)
        return ratios, rows

    monkeypatch.setattr(trainer._records, "take", watched)
    trainer.train()
    steps = recorded(trainer)["step"]
    assert ((steps >= 0) & (steps < 24)).tolist() == [True] * 96
    first_epoch, second_epoch = torch.cat(seen[:24]).tolist(), torch.cat(seen[24:]).tolist()
    assert len(first_epoch) == 72  # the margins that are logged are of pairs that are trained on
    sitters = sorted(set(range(96)) - set(first_epoch))
    assert len(sitters) == 24
    assert steps[sitters].nunique() >= 4  # spread over the epoch
    # Margins of the look at the data before the run are those of a model that has not moved.
    assert set(steps.index[steps == 0]) - set(sitters) == set(seen[0].tolist())
    assert set(sitters) <= set(second_epoch)


@pytest.mark.parametrize("case", CASES)
def test_sitters_leave_no_trace_in_trls_numbers(tmp_path: Path, case: str) -> None:
    trainer = build(tmp_path, train=pairs(32), num_train_epochs=2, **RISK, **CASES[case])
    trainer.train()
    rows = stop_of(trainer).history
    assert stop_of(trainer).switched_off is None
    assert [row["epoch"] for row in rows] == [1.0, 2.0]
    assert all(math.isfinite(row["estimated_test_reward_accuracy"]) for row in rows)
    tokens = [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]
    lengths = [
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in trainer.train_dataset.with_format(None)
    ]
    # The eight sitters of the first epoch are not counted, in the second all are.
    assert sum(lengths) * 1.6 < tokens[-1] < sum(lengths) * 1.9
    for model in filter(None, (trainer.model, trainer.ref_model)):
        assert not model._forward_hooks
    assert "compute_loss" not in vars(trainer)


def values_of_a_batch(trainer: Any) -> tuple[dict[str, torch.Tensor], float]:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    return trainer.example_values(), float(loss.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"noise": "off"},
        {"noise": "cdpo", "noise_rate": 0.2},
        {"noise": "rdpo", "noise_rate": 0.2},
        {"noise": "holder"},
        {"noise": "weights", "noise_rate": 0.2},
        {"noise": "auto", "pair_weight_column": "weight"},
        {"noise": "weights", "pair_weight_column": "weight"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_loss_of_each_pair_is_the_one_that_is_trained_on(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    data = easy_pairs(64).add_column("weight", [0.2 + 0.02 * row for row in range(64)])
    values, loss = values_of_a_batch(build(tmp_path, train=data, ref_model=1, **options))
    assert values["loss"].shape == (4,)
    assert not values["loss"].requires_grad
    assert float(values["loss"].mean()) == pytest.approx(loss, abs=1e-6)
    assert torch.equal(values["reward_accuracy"], (values["reward_margin"] > 0).float())


def test_losses_wait_for_the_noise_rate(tmp_path: Path) -> None:
    trainer = build(tmp_path, noise="cdpo", ref_model=1)
    values, _ = values_of_a_batch(trainer)
    assert values["loss"].isnan().all()
    assert values["reward_margin"].isfinite().all()
    trainer.state.epoch = 1.0  # the margins did not tell the rate: DPO's loss stays
    values, loss = values_of_a_batch(trainer)
    assert float(values["loss"].mean()) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": "ipo"}, r"loss_type=\['ipo'\]"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 4}, "the reference moves"),
    ],
    ids=str,
)
def test_where_the_losses_of_pairs_are_not_known(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    common = {"noise": "off", "max_steps": 2, "train": pairs(16), **options}
    with pytest.raises(ValueError, match=reason):
        build(tmp_path, stop_criterion="risk", **common).train()
    trainer = build(tmp_path, **common)
    trainer.train()
    assert stop_of(trainer).criterion_in_use == "signal"
    assert trainer.state.global_step == 2
