"""noise_source="microbatch" in fits with accumulate_grad_batches."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskOptimizer
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

PASSES = 4


def measured(params):
    return PopRiskAdamW(params, lr=0.0, weight_decay=0.0, noise_source="microbatch")


def noise_by_hand(steps, autocast=False):
    """s after the first steps of an epoch at the initial weights, by autograd."""
    model = toy.Classifier()
    batches = list(toy.loader())
    s = 0.0
    for step in range(steps):
        rows = []
        for x, y in batches[step * PASSES : (step + 1) * PASSES]:
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                loss = nn.functional.cross_entropy(model.net(x).float(), y)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten().double() for g in grads]))
        s = 0.99 * s + 0.01 * 2 / 1.9 * torch.stack(rows).var(0) / PASSES
    return s


def found(optimizer):
    (group,) = optimizer.param_groups
    states = [optimizer.state[p] for p in group["params"]]
    assert {s["dev_step"].item() for s in states} == {2.0}
    return torch.cat([s["exp_dev_sq"].flatten() for s in states]).double()


@pytest.mark.parametrize("scaler", [False, True], ids=["32-true", "16-mixed"])
@pytest.mark.parametrize("by", ["module", "callback"])
def test_micro_batches_of_accumulation(tmp_path, scaler, by):
    settings = {}
    if scaler:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        settings["plugins"] = [plugin]
    if by == "module":
        model, callbacks = toy.Classifier(measured), []
    else:
        model = toy.Classifier(lambda p: torch.optim.AdamW(p, lr=0.0))
        callbacks = [PopRiskOptimizer(noise_source="microbatch")]
    trainer = toy.trainer(
        tmp_path, callbacks, max_epochs=1, accumulate_grad_batches=PASSES, **settings
    )
    trainer.fit(model, toy.loader())
    assert trainer.global_step == 2
    s, expected = found(trainer.optimizers[0]), noise_by_hand(2, autocast=scaler)
    atol = (1e-2 if scaler else 1e-5) * float(expected.max())
    torch.testing.assert_close(s, expected, rtol=5e-2 if scaler else 1e-3, atol=atol)


def test_clipping_by_norm_is_seen(tmp_path):
    trainer = toy.trainer(
        tmp_path, max_epochs=1, accumulate_grad_batches=PASSES, gradient_clip_val=1e-3
    )
    trainer.fit(toy.Classifier(measured), toy.loader())
    expected = noise_by_hand(2)
    s = found(trainer.optimizers[0])
    assert float(s.sum() / expected.sum()) < 1e-3
    assert float(torch.corrcoef(torch.stack([s, expected]))[0, 1]) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "gradient accumulation steps to 2 or more"),
        (
            {
                "accumulate_grad_batches": 4,
                "gradient_clip_val": 1e-3,
                "gradient_clip_algorithm": "value",
            },
            "no clipping by value",
        ),
    ],
    ids=["no accumulation", "clipping by value"],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, message):
    trainer = toy.trainer(tmp_path, max_epochs=1, **options)
    with pytest.raises(RuntimeError, match=message):
        trainer.fit(toy.Classifier(measured), toy.loader())
