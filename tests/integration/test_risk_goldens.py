"""Checkpoints of the first release resume, and end as the uninterrupted run of that release did.

`tests/goldens/risk` was written by this file, run as a script with the code of that release. Who
sits out and what the rule decides are fixed here, so that its constants may change.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import poprisk_integrations.huggingface as hf
from poprisk_integrations.core.risk_stopping import RiskStopping
from poprisk_integrations.diagnostics import sitting_out
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.helpers import tiny_classifier
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

FOLDER = Path(__file__).parents[1] / "goldens" / "risk"
EXAMPLES, EPOCHS = 64, 8
BEST, STOP, TAIL = (16, 24), 40, 12
SAVED = {"trainer": (21, 42), "lightning": (16, 48)}  # in mid-run, in the cooldown
SAME = {"rel": 1e-5, "abs": 1e-6}


@pytest.fixture(autouse=True)
def decisions(monkeypatch):
    """The windows that are best, and the one that stops."""
    decide(monkeypatch.setattr, torch.tensor(json.loads((FOLDER / "joins.json").read_text())))


def decide(patch, joins):
    update = RiskStopping.update

    def decided(self, row, *, schedule=None):
        decision, step = update(self, row, schedule=schedule), row["step"]
        return replace(
            decision, stop=step >= STOP, is_best=step in BEST, cooldown_steps=TAIL,
            reason=f"decided at step {step}",
        )  # fmt: skip

    patch(RiskStopping, "update", decided)
    patch(sitting_out, "first_epochs", lambda *args, **kwargs: joins)


def trainer(root, resume=None):
    """The default criterion of a Trainer: report and last weights."""
    args = tiny_classifier.arguments(
        root, num_train_epochs=EPOCHS, save_strategy="steps", save_steps=SAVED["trainer"][0]
    )
    model, data = tiny_classifier.Classifier(width=4), tiny_classifier.dataset(EXAMPLES, wrong=0.5)
    stop = hf.PopRiskEarlyStoppingCallback()
    run = tiny_classifier.train(args, stop, model=model, train_dataset=data, resume=resume)
    return json.loads((root / "poprisk_stop.json").read_text()), run.model.state_dict()


class ByEpoch(torch.utils.data.Sampler):
    """Its order is that of the epoch, as Lightning resumes whole epochs."""

    epoch = 0

    def __len__(self):
        return EXAMPLES

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(EXAMPLES, generator=generator).tolist())


class Save(Callback):
    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step in SAVED["lightning"]:
            trainer.save_checkpoint(
                Path(trainer.default_root_dir) / f"step-{trainer.global_step}.ckpt"
            )


def lightning(root, resume=None):
    """The default criterion of a Lightning Trainer: the same."""
    data = DataLoader(toy.noisy_data(EXAMPLES), batch_size=8, sampler=ByEpoch())
    model = toy.Classifier(width=4, dim=16)
    logger = CSVLogger(root)
    callbacks = [PopRiskEarlyStopping(), Save()]
    run = toy.trainer(root, callbacks, logger=logger, max_epochs=EPOCHS, log_every_n_steps=8)
    run.fit(model, data, ckpt_path=resume)
    (path,) = root.rglob("poprisk_stop.json")
    return json.loads(path.read_text()), model.state_dict()


RUNS = {"trainer": trainer, "lightning": lightning}


@pytest.mark.parametrize("place", [0, 1], ids=["mid-run", "cooldown"])
@pytest.mark.parametrize("name", RUNS)
def test_an_old_checkpoint_ends_as_the_old_run_did(tmp_path, name, place):
    kept = FOLDER / name / str(SAVED[name][place])
    resume = kept / "step.ckpt" if name == "lightning" else shutil.copytree(kept, tmp_path / "from")
    report, weights = RUNS[name](tmp_path / "run", str(resume))
    expected = json.loads((FOLDER / name / "report.json").read_text())
    assert len(report["history"]) == len(expected["history"]) == STOP // 8
    for mine, theirs in zip(report["history"], expected["history"], strict=True):
        assert {k for k in mine if mine[k] is None} == {k for k in theirs if theirs[k] is None}
        known = {k: v for k, v in theirs.items() if v is not None}
        assert {k: mine[k] for k in known} == pytest.approx(known, **SAME)
    for key in ("criterion", "stopped", "stop_step", "best_step", "cooldown_step", "global_step"):
        assert report[key] == expected[key], key
    assert report.keys() >= expected.keys()
    for key, value in load_file(FOLDER / name / "weights.safetensors").items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)


def write(scratch):
    """Run both with the code at hand, and keep what a resume needs."""
    joins = sitting_out.first_epochs(EXAMPLES, share=0.15, seed=0, epochs=EPOCHS)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "joins.json").write_text(json.dumps(joins.tolist()) + "\n")
    decide(setattr, joins)
    for name, run in RUNS.items():
        report, weights = run(scratch / name)
        (FOLDER / name).mkdir(exist_ok=True)
        report["best_model_path" if name == "lightning" else "best_model_checkpoint"] = ""
        (FOLDER / name / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        save_file(weights, str(FOLDER / name / "weights.safetensors"))
        for step in SAVED[name]:
            to = FOLDER / name / str(step)
            if name == "lightning":
                to.mkdir(exist_ok=True)
                shutil.copy(scratch / name / f"step-{step}.ckpt", to / "step.ckpt")
            else:
                ignored = shutil.ignore_patterns("training_args.bin")
                shutil.copytree(scratch / name / f"checkpoint-{step}", to, ignore=ignored)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
