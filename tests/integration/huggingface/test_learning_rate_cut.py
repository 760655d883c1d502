"""PopRiskLRCut in real runs: when it cuts, that the cut lasts, and that it is resumed."""

import dataclasses

import pytest
import torch
import transformers
from transformers import TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import TinyModel, arguments, train, weights

WINDOW = 8


class _LearningRates(TrainerCallback):
    """Of every step, as the optimizer used it."""

    def __init__(self):
        self.at = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.at[state.global_step + 1] = optimizer.param_groups[0]["lr"]


def _args(path, **changes):
    options = {"optim": "sgd", "learning_rate": 1e-3, "num_train_epochs": 8, "max_grad_norm": 0.0}
    return arguments(path, **{**options, **changes})


def _scripted(says, **options):
    """A callback whose windows say what a test wants: "overshoots" or anything else."""
    cut = hf.PopRiskLRCut(window=WINDOW, **options)
    begin = cut.on_train_begin

    def on_train_begin(args, state, control, **kwargs):
        begin(args, state, control, **kwargs)
        window = cut._reader.window
        close = window.close
        number = state.global_step // WINDOW

        def scripted():
            nonlocal number
            number += 1
            sign = -1.0 if says[number - 1] == "overshoots" else 1.0
            measured = {"risk_decrease": sign, "agreement": 1.0}
            errors = {"risk_decrease_se": 0.1, "agreement_se": 0.1}
            return dataclasses.replace(close(), **measured, **errors)

        window.close = scripted

    cut.on_train_begin = on_train_begin
    return cut


def _with_a_floor():
    """A cosine of torch that ends at half the rate it begins with."""
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64, eta_min=5e-4)
    return {"model": model, "optimizers": (optimizer, schedule)}


@pytest.mark.parametrize("options", [dict, _with_a_floor])
def test_cuts_after_patience_and_the_schedule_goes_on_from_there(tmp_path, capsys, options):
    says = ["overshoots", "learns", *["overshoots"] * 6]
    rates = {}
    for name, callbacks in (("plain", ()), ("cut", (_scripted(says, max_cuts=2, factor=0.5),))):
        seen = _LearningRates()
        args = _args(tmp_path / name, lr_scheduler_type="cosine")
        trainer = train(args, seen, *callbacks, **options())
        rates[name] = seen.at
    # Windows 3 and 4 cut at step 32, windows 5 and 6 at step 48; then no more.
    for step, rate in rates["plain"].items():
        cuts = (step > 32) + (step > 48)
        assert rates["cut"][step] == pytest.approx(rate * 0.5**cuts)
    logged = {line["step"]: line.get("poprisk/lr_cuts") for line in trainer.state.log_history}
    assert (logged[28], logged[32], logged[48], logged[64]) == (0, 1, 2, 2)
    assert capsys.readouterr().err.count("poprisk: learning rate cut at step") == 2


def test_min_lr_limits_each_cut(tmp_path):
    seen = _LearningRates()
    cut = _scripted(["overshoots"] * 8, factor=0.3, patience=1, max_cuts=9, min_lr=2e-4)
    train(_args(tmp_path), seen, cut)
    assert [seen.at[step] for step in (8, 9, 17, 64)] == pytest.approx([1e-3, 3e-4, 2e-4, 2e-4])
    assert cut.metrics() == {"poprisk/lr_cuts": 2}  # at the limit nothing is cut


class _Valley(torch.nn.Module):
    """50 steep coordinates (curvature 1) and 200 flat ones with a steady slope; per-batch noise."""

    def __init__(self):
        super().__init__()
        self.steep = torch.nn.Parameter(torch.ones(50))
        self.flat = torch.nn.Parameter(torch.zeros(200))

    def forward(self, x, labels=None):
        bowl = 0.5 * (self.steep - 0.1 * x[:, :50]).square().sum(-1)
        slope = 1e-3 * ((1.0 + x[:, 50:]) * self.flat).sum(-1)
        return {"loss": (bowl + slope).mean(), "logits": x}


@pytest.mark.parametrize(("lr", "cuts"), [(1.9, 1), (0.01, 0)])
def test_a_learning_rate_that_overshoots_is_cut(tmp_path, lr, cuts):
    """Unscripted: at 1.9 the steep coordinates jump across the valley while the slope persists."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * 128, 250, generator=generator)
    data = [{"x": row, "labels": torch.zeros(())} for row in x]
    cut = hf.PopRiskLRCut(window=16, max_cuts=1)
    args = _args(tmp_path, learning_rate=lr, num_train_epochs=1)
    trainer = train(args, cut, model=_Valley(), train_dataset=data)
    assert cut.rule_state["cuts"] == cuts
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(lr * 0.3**cuts)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself draws other batches after a resume within an epoch",
)
def test_resume_is_bitwise(tmp_path):
    says = ["overshoots"] * 8
    options = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 20}
    runs = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-20"))):
        seen, cut = _LearningRates(), _scripted(says)
        trainer = train(_args(tmp_path / name, **options), seen, cut, resume=resume)
        runs.append((seen.at, cut.state(), weights(trainer.model)))
    (rates, state, model), (later, restored, again) = runs
    assert state["attributes"]["rule_state"]["cuts"] == 3
    assert later == {step: rate for step, rate in rates.items() if step > 20}
    assert restored == state
    assert all(torch.equal(model[name], again[name]) for name in model)


def test_beside_the_stop(tmp_path):
    """Two windows, two files, one run; the stop is where it is without."""
    options = {"optim": "adamw_torch", "learning_rate": 3e-2, "num_train_epochs": 16}
    alone = hf.PopRiskEarlyStoppingCallback(window=WINDOW)
    train(_args(tmp_path / "alone", **options), alone)
    stop = hf.PopRiskEarlyStoppingCallback(window=WINDOW)
    cut = _scripted(["learns"] * 16)
    saving = {"save_strategy": "steps", "save_steps": 20}
    trainer = train(_args(tmp_path / "both", **options, **saving), stop, cut)
    assert stop.stopping_state == alone.stopping_state
    files = {p.name for p in (tmp_path / "both" / "checkpoint-20").glob("poprisk_*")}
    assert files == {"poprisk_window.safetensors", "poprisk_lr_cut_window.safetensors"}
    assert trainer.state.log_history[-1]["poprisk/lr_cuts"] == 0


def test_min_lr_is_for_the_largest_rate_and_groups_keep_their_ratio(tmp_path):
    """As in Lightning: one factor for all groups, so that no schedule is bent."""
    model = TinyModel()
    groups = [
        {"params": list(model.embed.parameters()), "lr": 1e-4},
        {"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 1e-3},
    ]
    cut = _scripted(["overshoots"] * 8, factor=0.3, patience=1, max_cuts=9, min_lr=2e-4)
    optimizers = (torch.optim.SGD(groups, lr=1e-3), None)
    trainer = train(_args(tmp_path), cut, model=model, optimizers=optimizers)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([2e-5, 2e-4])
    assert cut.rule_state["cuts"] == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("factor", 1.0), ("patience", 0), ("max_cuts", 0), ("min_lr", -1.0), ("window", 3)],
)
def test_bad_arguments_are_named(option, value):
    with pytest.raises(ValueError, match=f"Invalid {option}: {value}"):
        hf.PopRiskLRCut(**{option: value})
