"""Which gradients the window and the optimizer get: compared with autograd by hand.

That a window does not depend on clipping, accumulation and precision is in
`tests/integration/test_stop_contract.py`.
"""

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskOptimizer
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

CLIP = 1e-3
PASSES = 4


def still(fused):
    """Learning rate 0: every gradient can be computed by hand at the initial weights."""
    return toy.Classifier(lambda params: torch.optim.SGD(params, lr=0.0, fused=fused))


def by_hand(batches, dtype=None):
    """One row per batch: the gradient of its mean loss, by autograd at the initial weights."""
    model, rows = toy.Classifier(), []
    for x, y in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model.net(x).float(), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten().double() for g in grads]))
    return torch.stack(rows)


def window(stop):
    """A and the number of counted steps of the unfinished window, from the state."""
    state = stop.state_dict()["window"]
    sums = [state["sums"][key].flatten() for key in sorted(state["sums"], key=int)]
    return torch.cat(sums).double(), int(state["counted"])


@pytest.mark.parametrize(
    ("settings", "fused", "accumulate", "rel"),
    [
        ({}, False, 1, 1e-5),
        # 8 micro-batches by 3: the third step of an epoch has 2, each divided by 3.
        ({}, False, 3, 1e-5),
        ({"precision": "bf16-true"}, False, 1, 5e-2),
        # Hooks see the gradients of fused optimizers scaled.
        ({"plugins": [toy.fp16()]}, True, 3, 5e-3),
    ],
    ids=["plain", "short steps", "bf16-true", "fused fp16"],
)
def test_a_window_sums_the_gradients_of_whole_steps(tmp_path, settings, fused, accumulate, rel):
    stop = toy.watch(window=100)
    settings |= {
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": None if fused else CLIP,
    }
    _, trainer = toy.fit(tmp_path, stop, model=still(fused), max_epochs=1, **settings)
    sums, counted = window(stop)
    assert counted == trainer.global_step == -(-8 // accumulate)
    # Micro-batches are of equal size, so their mean is the gradient of the joined batch.
    expected = by_hand(toy.loader(batch_size=32 * accumulate)).sum(0)
    torch.testing.assert_close(sums, expected, rtol=0, atol=rel * float(expected.norm()))


def test_a_skipped_training_step_is_left_out(tmp_path):
    class Skips(toy.Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    stop = toy.watch(window=100)
    with pytest.warns(UserWarning, match="returned `None`"):
        toy.fit(tmp_path, stop, model=Skips(), max_epochs=1)
    assert window(stop)[1] == 7


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_count_neither_in_the_window_nor_as_time(tmp_path, fused):
    """The first scales overflow fp16; each skip makes the scale smaller."""
    plugin = toy.fp16(init_scale=2.0**24, backoff_factor=2.0**-4)
    stop = toy.watch(window=100)
    model = toy.Classifier(lambda params: torch.optim.AdamW(params, lr=0.5, fused=fused))
    _, trainer = toy.fit(tmp_path, stop, model=model, max_epochs=2, plugins=[plugin])
    (applied,) = {int(s["step"]) for s in trainer.optimizers[0].state.values()}
    assert 0 < applied < trainer.global_step == 16  # Lightning counts skipped steps as steps
    sums, counted = window(stop)
    assert counted == applied
    assert sums.isfinite().all()
    assert stop.state_dict()["rule"]["lr_sum"] == pytest.approx(0.5 * applied)


# What reaches PopRiskAdamW.


def clipped_fit(root, make_optimizer, plugins=None, callbacks=()):
    model = toy.Classifier(make_optimizer)
    settings = {"max_epochs": 1, "gradient_clip_val": CLIP, "plugins": plugins}
    _, trainer = toy.fit(root, *callbacks, model=model, **settings)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, PopRiskAdamW)
    states = list(optimizer.state.values())
    assert {float(s["step"]) for s in states} == {float(toy.STEPS_PER_EPOCH)}
    return torch.cat([s["exp_avg"].flatten() for s in states])


@pytest.mark.parametrize("by", ["module", "callback", "callback for fused AdamW"])
def test_the_optimizer_gets_unscaled_clipped_gradients(tmp_path, by):
    expected = clipped_fit(tmp_path, toy.gated)
    make_optimizer, callbacks = toy.gated, []
    if by != "module":
        make_optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2, fused="fused" in by)  # noqa: E731
        callbacks = [PopRiskOptimizer()]
    found = clipped_fit(tmp_path, make_optimizer, [toy.fp16()], callbacks)
    assert float(found.norm()) <= CLIP
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:.*no C\\+\\+ compiler")
def test_only_fused_asked_for_is_refused_with_a_scaler(tmp_path):
    """It would unscale in its own step, after clipping: Lightning says so."""

    def fused(params):
        return PopRiskAdamW(params, lr=1e-2, fused=True)

    if not fused([torch.nn.Parameter(torch.zeros(2))])._step_supports_amp_scaling:
        pytest.skip("fused=True needs a compiler here")
    with pytest.raises(RuntimeError, match="PopRiskAdamW, does not allow for gradient clipping"):
        clipped_fit(tmp_path, fused, [toy.fp16()])


def measured(params):
    return PopRiskAdamW(params, lr=0.0, weight_decay=0.0, noise_source="microbatch")


def found_noise(trainer):
    (group,) = trainer.optimizers[0].param_groups
    states = [trainer.optimizers[0].state[p] for p in group["params"]]
    assert {s["dev_step"].item() for s in states} == {2.0}
    return torch.cat([s["exp_dev_sq"].flatten() for s in states]).double()


@pytest.fixture
def noise():
    """s after the two steps of an epoch at the initial weights, {dtype: tensor}."""
    found = {}
    for dtype in (None, torch.float16):
        rows, s = by_hand(toy.loader(), dtype), 0.0
        for step in range(2):
            variance = rows[step * PASSES : (step + 1) * PASSES].var(0)
            s = 0.99 * s + 0.01 * 2 / 1.9 * variance / PASSES
        found[dtype] = s
    return found


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("by", ["module", "callback"])
def test_noise_of_the_micro_batches_of_accumulation(tmp_path, noise, dtype, by):
    settings = {"plugins": [toy.fp16()]} if dtype else {}
    model, callbacks = toy.Classifier(measured), []
    if by == "callback":
        model = toy.Classifier(lambda p: torch.optim.AdamW(p, lr=0.0))
        callbacks = [PopRiskOptimizer(noise_source="microbatch")]
    settings |= {"max_epochs": 1, "accumulate_grad_batches": PASSES}
    _, trainer = toy.fit(tmp_path, *callbacks, model=model, **settings)
    rtol, share = (5e-2, 1e-2) if dtype else (1e-3, 1e-5)
    atol = share * float(noise[dtype].max())
    torch.testing.assert_close(found_noise(trainer), noise[dtype], rtol=rtol, atol=atol)


def test_clipping_by_norm_is_seen_in_the_noise(tmp_path, noise):
    settings = {"max_epochs": 1, "accumulate_grad_batches": PASSES, "gradient_clip_val": CLIP}
    _, trainer = toy.fit(tmp_path, model=toy.Classifier(measured), **settings)
    s = found_noise(trainer)
    assert float(s.sum() / noise[None].sum()) < 1e-3
    assert float(torch.corrcoef(torch.stack([s, noise[None]]))[0, 1]) > 0.95


BY_VALUE = {"gradient_clip_val": CLIP, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "gradient accumulation steps to 2 or more"),
        ({"accumulate_grad_batches": 4, **BY_VALUE}, "no clipping by value"),
    ],
    ids=["no accumulation", "clipping by value"],
)
def test_noise_that_cannot_be_measured_is_refused(tmp_path, options, message):
    with pytest.raises(RuntimeError, match=message):
        toy.fit(tmp_path, model=toy.Classifier(measured), max_epochs=1, **options)
