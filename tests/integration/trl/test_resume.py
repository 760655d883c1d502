"""A run that was killed and resumed is the uninterrupted one, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset

from poprisk_integrations.trl.label_flips import flip_preferences
from tests.helpers.tiny_dpo import (
    Interrupt,
    dpo_trainer,
    easy_pairs,
    losses_of,
    pairs,
    weights_of,
)

SIGNAL = {
    "max_steps": 18, "learning_rate": 3e-3, "stop_window": 4, "stop_action": "monitor",
    "stop_criterion": "signal", "noise": "cdpo", "noise_rate": 0.2,
}  # fmt: skip
ESTIMATED = {
    "noise": "rdpo", "stop": False, "max_steps": 60, "learning_rate": 1e-2,
    "per_device_train_batch_size": 8, "optim": "adamw_torch",
}  # fmt: skip
SITTERS = {
    "stop_criterion": "risk", "stop_sit_out": 0.5, "stop_restore": "none", "optim": "adamw_torch",
    "max_steps": -1, "num_train_epochs": 3, "noise": "cdpo", "noise_rate": 0.2,
}  # fmt: skip


def noisy() -> Dataset:
    return flip_preferences(easy_pairs(320), 0.25, seed=1)[0]


# Name -> data, options, the steps at which the run is cut, and the last one.
CASES: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], int]] = {
    # Inside an epoch of 2 steps and inside a window of 4.
    "signal, accumulation": (pairs, {**SIGNAL, "gradient_accumulation_steps": 2}, (7,), 18),
    "noise rate, first and second epoch": (noisy, ESTIMATED, (13, 50), 60),
    "sitters, second epoch": (lambda: easy_pairs(64), SITTERS, (21,), 48),
}


def found(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(tmp_path: Path, case: str) -> None:
    make, options, cuts, last = CASES[case]
    options = {"save_strategy": "steps", "save_steps": last, **options}
    whole = dpo_trainer(tmp_path / "whole", make(), **options)
    whole.train()
    noise = found(tmp_path / "whole", "poprisk_noise.json")
    assert noise["loss"] == options["noise"]
    for cut in cuts:
        folder = tmp_path / f"cut-{cut}"
        dpo_trainer(folder, make(), callbacks=[Interrupt(cut)], **options).train()
        assert not (folder / f"checkpoint-{last}").exists()
        resumed = dpo_trainer(folder, make(), **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{cut}"))

        assert whole.state.global_step == resumed.state.global_step == last
        assert torch.equal(weights_of(whole), weights_of(resumed))
        assert losses_of(whole) == losses_of(resumed)
        reports = [trainer.flip_report().to_pandas() for trainer in (whole, resumed)]
        pd.testing.assert_frame_equal(*reports)
        assert found(folder, "poprisk_noise.json") == noise
        folders = (tmp_path / "whole", folder)
        if options.get("stop", True):
            stops = [found(run, "poprisk_stop.json")["history"] for run in folders]
            assert len(stops[0]) >= 3
            for expected, row in zip(*stops, strict=True):
                for name in ("step", "signal_ratio", "estimated_test_loss"):
                    assert row[name] == pytest.approx(expected[name], abs=1e-6)
        states = [
            torch.load(run / f"checkpoint-{last}" / "optimizer.pt", weights_only=True)["state"]
            for run in folders
        ]
        for index, expected in states[0].items():
            for key, value in expected.items():
                assert torch.equal(states[1][index][key], value), (index, key)
