"""The search under Lightning's Trainer and transformers': it finds a rate and leaves no trace."""

import json
import math

import pytest
import torch
from lightning import pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from poprisk_integrations import huggingface as hf
from poprisk_integrations import lightning as pop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
LR = 1e-3
FRAMEWORKS = ("lightning", "huggingface")


def regression(n=240, noise=0.3, scale=1.0):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(10, 1, generator=g), torch.randn(n, 10, generator=g)
    return TensorDataset(x, scale * (x @ w + noise * torch.randn(n, 1, generator=g)))


class Net(nn.Module):
    """Has what a training changes: weights, running statistics, random numbers, a counter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(nn.Linear(10, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(24, 1)
        self.frozen = nn.Linear(10, 1).requires_grad_(False)
        self.calls = []

    def forward(self, x, labels):
        if self.training:
            self.calls.append(len(x))
        return {"loss": (self.head(self.body(x)) + self.frozen(x) - labels).square().mean()}

    def groups(self, lr):
        return [
            {"params": self.body.parameters(), "lr": lr},
            {"params": self.head.parameters(), "lr": lr / 4},
        ]


class Module(pl.LightningModule):
    def __init__(self, lr, optimizer=torch.optim.AdamW, schedule=None, manual=False):
        super().__init__()
        self.net = Net()
        self.options = lr, optimizer, schedule
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = self.net(*batch)["loss"]
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(*batch)["loss"])

    def configure_optimizers(self):
        lr, cls, schedule = self.options
        optimizer = cls(self.net.parameters() if cls is torch.optim.LBFGS else self.net.groups(lr))
        if schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": schedule(optimizer, lr), "interval": "step"}]


def onecycle(optimizer, lr):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[lr, lr / 4], total_steps=90)


def decay(optimizer, lr):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 9) * 0.99**k)


def lightning_run(
    lr,
    finder=None,
    *,
    tmp_path,
    data=None,
    batch=8,
    generator=False,
    ckpt_path=None,
    module=None,
    **options,
):
    module = module or {}
    pl.seed_everything(3, verbose=False)
    model = Module(lr, **module)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[finder] if finder else [],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **options},
    )
    own = torch.Generator().manual_seed(5) if generator else None
    loader = DataLoader(data or regression(), batch, shuffle=True, generator=own)
    trainer.fit(model, loader, DataLoader(regression(n=32), batch), ckpt_path=ckpt_path)
    return finder and finder.results, model.net, trainer


def huggingface_run(lr, steps=None, *, tmp_path, data=None, batch=8, groups=False, **options):
    """`steps`: those of a search before the run; None for no search."""
    net = Net()
    given = (None, None)
    if groups:
        optimizer = torch.optim.AdamW(net.groups(lr))
        given = optimizer, decay(optimizer, lr)
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=10,
        **options,
    )
    rows = [{"x": x, "labels": y} for x, y in data or regression()]
    trainer = Trainer(net, args, train_dataset=rows, optimizers=given)
    found = None
    if steps is not None:
        found = hf.suggest_learning_rate(trainer, steps, 8, candidates=4, update=True)
        assert trainer.state.global_step == 0
        assert net.calls == []
    trainer.train()
    return found, net, trainer


def both(framework, tmp_path, steps=20, **options):
    """A run after a search, and one without at the rate that it found."""
    if framework == "lightning":
        finder = pop.PopRiskLearningRateFinder(steps, 8, candidates=4)
        searched = lightning_run(LR, finder, tmp_path=tmp_path, **options)
        return searched, lightning_run(searched[0].suggested, tmp_path=tmp_path, **options)
    searched = huggingface_run(LR, steps, tmp_path=tmp_path, **options)
    return searched, huggingface_run(searched[0].suggested, tmp_path=tmp_path, **options)


CELLS = {
    "lightning": ("lightning", {"gradient_clip_val": 1.0}),
    "lightning onecycle": ("lightning", {"module": {"schedule": onecycle}}),
    "lightning generator": ("lightning", {"module": {"schedule": decay}, "generator": True}),
    "lightning accumulation": ("lightning", {"accumulate_grad_batches": 2, "batch": 4}),
    "lightning bf16": ("lightning", {"precision": "bf16-mixed"}),
    "lightning sgd": ("lightning", {"module": {"optimizer": torch.optim.SGD}}),
    "trainer": ("huggingface", {}),
    "trainer given groups": ("huggingface", {"groups": True}),
    "trainer accumulation": ("huggingface", {"gradient_accumulation_steps": 2, "batch": 4}),
    "trainer bf16": ("huggingface", {"bf16": True}),
    "trainer sgd cosine": (
        "huggingface",
        {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 5},
    ),
    "trainer poprisk": ("huggingface", {"optim": "poprisk_adamw"}),
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_run_after_a_search_is_the_run_at_its_rate(cell, tmp_path):
    framework, options = CELLS[cell]
    (found, net, trainer), (_, expected, untouched) = both(framework, tmp_path, **options)
    assert len(found.candidates) >= 3
    assert found.low < found.suggested < found.high
    # scaling a schedule's base rate rounds once more than making it at that rate
    exact = framework == "huggingface" or "module" not in options
    for (name, value), other in zip(
        net.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        if exact:
            assert torch.equal(value, other), name
        else:
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    assert net.calls == expected.calls
    if framework == "lightning":
        assert trainer.global_step == untouched.global_step
        assert trainer.callback_metrics.keys() == untouched.callback_metrics.keys()
        assert trainer.current_epoch == untouched.current_epoch == 3
    else:
        kept = [[row.get("loss") for row in t.state.log_history] for t in (trainer, untouched)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_it_suggests_trains_better_than_the_default(framework, tmp_path):
    run, search = lightning_run, pop.PopRiskLearningRateFinder(20, 8)
    if framework == "huggingface":
        run, search = huggingface_run, 20
    searched, default = run(LR, search, tmp_path=tmp_path), run(LR, tmp_path=tmp_path)[1]
    x, y = (part[240:] for part in regression(n=560).tensors)
    with torch.no_grad():
        ours, theirs = (float(net.eval()(x, y)["loss"]) for net in (searched[1], default))
    assert ours < 0.7 * theirs


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_losses_are_those_of_whole_steps(framework, tmp_path):
    """Means over a step's examples, however many micro-batches they come in."""

    def losses(batch, accumulation):
        if framework == "lightning":
            search, name = (
                pop.PopRiskLearningRateFinder(20, 8, candidates=3),
                "accumulate_grad_batches",
            )
            run = lightning_run
        else:
            search, name, run = 20, "gradient_accumulation_steps", huggingface_run
        options = {"tmp_path": tmp_path, "batch": batch, name: accumulation}
        return {c.rate: c.loss for c in run(LR, search, **options)[0].candidates}

    whole, parts = losses(8, 1), losses(4, 2)
    assert parts[LR] == pytest.approx(whole[LR], rel=0.2)  # batch norm sees fewer at once


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": regression(n=200), "batch": 8}, "One pass over the data has 25 optimizer steps"),
        ({"data": regression(scale=math.nan)}, "The loss is nan before any step"),
        ({"lr": 0.0}, r"Invalid lr: 0(\.0)? in a parameter group"),
    ],
    ids=["short epoch", "nan", "rate of zero"],
)
def test_refuses_before_the_run(framework, change, message, tmp_path):
    change = dict(change)
    lr = change.pop("lr", LR)
    if framework == "lightning":
        run, search = lightning_run, pop.PopRiskLearningRateFinder()
    else:
        run, search = huggingface_run, 100
        change["groups"] = lr == 0.0
    with pytest.raises(ValueError, match=message):
        run(lr, search, tmp_path=tmp_path, **change)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"manual": True}, "needs automatic optimization"),
        ({"optimizer": torch.optim.LBFGS}, "one gradient per step, found LBFGS"),
    ],
    ids=["manual", "closures"],
)
def test_lightning_refuses_by_name(module, message, tmp_path):
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=message):
        lightning_run(LR, pop.PopRiskLearningRateFinder(), tmp_path=tmp_path, module=module)


def test_short_epochs_shorten_the_search(tmp_path):
    finder = pop.PopRiskLearningRateFinder(candidates=3)
    found, *_ = lightning_run(LR, finder, tmp_path=tmp_path, data=regression(n=480))
    assert (found.steps, found.score_batches) == (44, 16)
    assert "44 steps instead of 100" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 19}, "Invalid steps: 19. Must be finite and >= 20."),
        ({"score_batches": 7}, "Invalid score_batches: 7"),
        ({"start": 0.0}, "Invalid start: 0.0. Must be finite and > 0."),
        ({"factor": 1.0}, "Invalid factor: 1.0"),
        ({"candidates": 2}, "Invalid candidates: 2"),
        ({"horizon": 0}, "Invalid horizon: 0"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        pop.PopRiskLearningRateFinder(**options)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_only_tells_with_update_off_and_not_at_all_on_a_resume(tmp_path):
    finder = pop.PopRiskLearningRateFinder(20, 8, update=False)
    found, net, trainer = lightning_run(
        LR, finder, tmp_path=tmp_path, logger=True, enable_checkpointing=True
    )
    _, expected, _ = lightning_run(LR, tmp_path=tmp_path)
    assert found.suggested > 2 * LR
    assert torch.equal(net.head.weight, expected.head.weight)
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "poprisk/lr_suggested" in logged
    path = trainer.checkpoint_callback.best_model_path
    again = pop.PopRiskLearningRateFinder(20, 8)
    found, *_ = lightning_run(
        LR, again, tmp_path=tmp_path, ckpt_path=path, logger=True, enable_checkpointing=True
    )
    assert found is None


def test_result_as_json_and_as_a_picture(tmp_path):
    finder = pop.PopRiskLearningRateFinder(20, 8)
    with pytest.raises(RuntimeError, match="has not searched yet"):
        finder.plot()
    found, *_ = lightning_run(LR, finder, tmp_path=tmp_path)
    found.save(tmp_path / "rate.json")
    told = json.loads((tmp_path / "rate.json").read_text())
    assert told["suggested"] == found.suggested
    assert [c["rate"] for c in told["candidates"]] == sorted(c.rate for c in found.candidates)
    axes = finder.plot()
    assert axes.get_xscale() == "log"
    assert f"suggested for 90 steps: {found.suggested:.1e}" in axes.get_legend_handles_labels()[1]
