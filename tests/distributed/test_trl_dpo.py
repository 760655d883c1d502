"""DPO and reward models in two processes: numbers bit for bit, joined margins, one stop for all."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from tests.helpers.tiny_dpo import (
    dpo_trainer,
    easy_pairs,
    losses_of,
    pairs,
    tiny_model,
    upstream_numbers,
    weights_of,
)
from tests.helpers.tiny_reward import reward_trainer

pytestmark = [
    pytest.mark.distributed,
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]

OF_TRL = {"kind": DPOTrainer, "config": DPOConfig}
WATCHED = {
    "stop_criterion": "signal", "stop_action": "monitor", "stop_window": 4, "noise": "off",
}  # fmt: skip
OURS = ("kl_data", "margin_p10", "margin_p50", "signal_ratio")


def train(output_dir, world_size, data=None, **options):
    """On batches of 8, of all processes together."""
    settings = {"per_device_train_batch_size": 8 // world_size, **options}
    if "kind" not in options:
        settings.setdefault("stop", False)
    trainer = dpo_trainer(output_dir, pairs(32) if data is None else data, **settings)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def watched(folder, world_size, **options):
    """The same run by TRL's trainer and by ours, which only watches."""
    settings = {"optim": "adamw_torch", **options}
    theirs = train(f"{folder}/theirs", world_size, **OF_TRL, **settings)
    mine = train(f"{folder}/ours", world_size, **{**WATCHED, "stop": True}, **settings)
    return {
        "weights": [weights_of(theirs), weights_of(mine)],
        "logs": [upstream_numbers(theirs), upstream_numbers(mine)],
        "rewards": [logged(mine, f"rewards/{name}") for name in ("chosen", "rejected")],
        **{name: logged(mine, f"poprisk/{name}") for name in OURS},
    }


def whole_model(rank, world_size, folder):
    return watched(folder, world_size, gradient_accumulation_steps=2)


def adapter(rank, world_size, folder):
    lora = LoraConfig(r=4, target_modules=["v_proj", "o_proj"])
    return watched(folder, world_size, peft_config=lora, ref_model=None, learning_rate=0.05)


def stopping(rank, world_size, folder):
    settings = {"stop_criterion": "signal", "stop_window": 4, "stop_kappa": 1.0, "stop": True}
    settings |= {"max_steps": 200, "learning_rate": 3e-3, "optim": "adamw_torch"}
    trainer = train(f"{folder}/stop", world_size, **settings)
    stop = trainer.callback_handler.callbacks[-1]
    return {"step": trainer.state.global_step, "state": stop.stopping_state}


def sgd(rank, world_size, folder):
    return weights_of(train(f"{folder}/sgd", world_size, optim="sgd", learning_rate=0.1))


def noisy(rank, world_size, folder):
    """130 pairs: the last batch is short, and padded with pairs of the first on two processes."""
    out = Path(folder, f"noisy-{world_size}")
    settings = {"noise": "rdpo", "optim": "sgd", "learning_rate": 0.3, "max_steps": 40}
    trainer = train(out, world_size, easy_pairs(130), **settings)
    report = trainer.flip_report().to_pandas()
    return {
        "margins": report["margin"].tolist(),
        "steps": report["step"].tolist(),
        "rates": logged(trainer, "poprisk/noise_rate"),
        "losses": losses_of(trainer),
    }


def sitters(rank, world_size, folder):
    """A model that stands still, so that what is measured of a pair does not depend on when."""
    settings = {"optim": "sgd", "learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 3}
    settings |= {"stop": True, "stop_criterion": "risk", "stop_sit_out": 0.3, "ref_model": 1}
    settings |= {"gradient_accumulation_steps": 2}
    trainer = train(f"{folder}/risk-{world_size}", world_size, easy_pairs(75), **settings)
    return {
        "history": trainer.callback_handler.callbacks[-1].history,
        "margins": trainer.flip_report().to_pandas()["margin"].tolist(),
        "steps": trainer.state.global_step,
    }


def reward(rank, world_size, folder):
    """Learning, and then standing still with sitters, for the reasons above."""
    settings = {"optim": "sgd", "per_device_train_batch_size": 8 // world_size, "noise_rate": 0.2}
    learning = reward_trainer(
        Path(folder, f"reward-{world_size}"), easy_pairs(66), stop=False, max_steps=12,
        learning_rate=0.03, **settings,
    )  # fmt: skip
    learning.train()
    still = reward_trainer(
        Path(folder, f"still-{world_size}"), easy_pairs(66), max_steps=-1, num_train_epochs=2,
        stop_criterion="risk", stop_sit_out=0.3, learning_rate=0.0, **settings,
    )  # fmt: skip
    still.train()
    reports = [
        trainer.flip_report().to_pandas().sort_values("row") for trainer in (learning, still)
    ]
    return {
        "margins": [report["margin"].tolist() for report in reports],
        "steps": reports[0]["step"].tolist(),
        # Up to the last batch of the epoch, which is short, and padded on two processes.
        "losses": losses_of(learning)[:8],
        "logged": logged(learning, "poprisk/margin_p50")[:8],
        "estimate": still.callback_handler.callbacks[-1].history[0]["estimated_test_loss"],
    }


JOBS = {2: [whole_model, adapter, stopping, sgd, noisy, sitters, reward]}


@pytest.mark.parametrize("job", [whole_model, adapter])
def test_numbers_are_those_of_trl(results, job):
    ranks = results(2, job)
    for found in ranks:
        assert torch.equal(*found["weights"])
        assert found["logs"][0] == found["logs"][1]
        # Margins of both ranks: their mean log-ratio is that of TRL's gathered rewards.
        beta = 0.1
        expected = [sum(rewards) / 2 / beta for rewards in zip(*found["rewards"], strict=True)]
        assert found["kl_data"] == pytest.approx(expected, abs=1e-4)
        assert any(abs(value) > 1e-3 for value in expected)
        assert found["margin_p10"][-1] < found["margin_p50"][-1]
        assert len(found["signal_ratio"]) > 0
    assert all(ranks[0][name] == ranks[1][name] for name in OURS)


def test_both_processes_stop_together(results):
    first, second = results(2, stopping)
    assert first == second
    assert first["step"] == first["state"]["stop_step"] < 200


def test_weights_are_those_of_one_process(results, tmp_path):
    alone = sgd(0, 1, tmp_path)
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    for weights in results(2, sgd):
        assert (weights - alone).abs().max() < 1e-6
        assert (weights - start).abs().max() > 1e-3


def test_wrong_labels_are_found_by_both(results, folder, tmp_path):
    first, second = results(2, noisy)
    assert first == second
    alone = noisy(0, 1, tmp_path)
    assert len(first["rates"]) > 0
    for key, near in {"steps": 0, "margins": 1e-4, "rates": 2e-3}.items():
        assert first[key] == pytest.approx(alone[key], abs=near)
    mine, theirs = (
        json.loads(path.read_text())
        for path in (
            Path(folder, "noisy-2", "poprisk_noise.json"),
            tmp_path / "noisy-1" / "poprisk_noise.json",
        )
    )
    assert mine == pytest.approx(theirs, abs=2e-3)
    assert Path(folder, "noisy-2", "flip_report.csv").exists()


def test_sitters_of_both_make_one_estimate(results, tmp_path):
    """And each pair is in the record once."""
    first, second = results(2, sitters)
    assert first == second
    alone = sitters(0, 1, tmp_path)
    assert first["steps"] == alone["steps"]
    assert first["margins"] == pytest.approx(alone["margins"], abs=1e-5)
    assert len(first["history"]) == 3
    row, expected = first["history"][0], alone["history"][0]
    for name in ("loss", "reward_accuracy", "reward_margin"):
        key = f"estimated_test_{name}"
        assert row[key] == pytest.approx(expected[key], abs=1e-5), name
    assert 0.1 < row["estimated_test_reward_accuracy"] < 0.9


def test_a_reward_model_is_that_of_one_process(results, tmp_path):
    first, second = results(2, reward)
    assert first == second
    alone = reward(0, 1, tmp_path)
    for key, near in {"steps": 0, "losses": 1e-4, "logged": 1e-4, "estimate": 1e-5}.items():
        assert first[key] == pytest.approx(alone[key], abs=near), key
    for mine, theirs in zip(first["margins"], alone["margins"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert first["margins"][0] != pytest.approx(first["margins"][1], abs=0.1)  # it has learned
