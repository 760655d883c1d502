"""Gradient clipping with autocast, with and without a gradient scaler."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskOptimizer
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

CLIP = 1e-3


def plugin(precision):
    """Lightning turns "16-mixed" on CPU into bf16-mixed; a plugin keeps the scaler path."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None
    return MixedPrecision(precision, "cpu", scaler)


def clipped_fit(root, make_optimizer, precision=None, callbacks=()):
    plugins = [] if precision is None else [plugin(precision)]
    trainer = toy.trainer(
        root, callbacks, max_epochs=1, gradient_clip_val=CLIP, plugins=plugins or None
    )
    model = toy.Classifier(make_optimizer)
    trainer.fit(model, toy.loader())
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, PopRiskAdamW)
    assert trainer.global_step == toy.STEPS_PER_EPOCH
    states = list(optimizer.state.values())
    assert {float(s["step"]) for s in states} == {float(toy.STEPS_PER_EPOCH)}
    return torch.cat([s["exp_avg"].flatten() for s in states])


def fused_adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("by", ["module", "callback", "callback for fused AdamW"])
def test_the_optimizer_gets_unscaled_clipped_gradients(tmp_path, precision, by):
    expected = clipped_fit(tmp_path, toy.gated)
    assert float(expected.norm()) <= CLIP
    make_optimizer, callbacks = toy.gated, []
    if by != "module":
        make_optimizer = fused_adamw if "fused" in by else toy.adamw
        callbacks = [PopRiskOptimizer()]
    found = clipped_fit(tmp_path, make_optimizer, precision, callbacks)
    assert float(found.norm()) <= CLIP
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:.*no C\\+\\+ compiler")
def test_only_fused_asked_for_is_refused_with_a_scaler(tmp_path):
    """It would unscale in its own step, after clipping: Lightning says so."""

    def fused(params):
        return PopRiskAdamW(params, lr=1e-2, fused=True)

    parameter = torch.nn.Parameter(torch.zeros(2))
    if not fused([parameter])._step_supports_amp_scaling:
        pytest.skip("fused=True needs a compiler here")
    with pytest.raises(RuntimeError, match="PopRiskAdamW, does not allow for gradient clipping"):
        clipped_fit(tmp_path, fused, "16-mixed")
