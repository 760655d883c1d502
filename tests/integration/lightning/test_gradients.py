"""The window holds complete, unscaled, unclipped gradients: compared with autograd by hand."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


def scaler_on_cpu(init_scale=1024.0, **kwargs):
    """Lightning turns "16-mixed" on CPU into bf16-mixed; a plugin keeps the scaler path."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **kwargs)
    return MixedPrecision("16-mixed", "cpu", scaler)


class Recorder(pl.Callback):
    """The gradients of each step as they reach hooks, and which steps were short."""

    def __init__(self):
        self.grads = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append([p.grad.detach().clone() for p in pl_module.parameters()])


class Frozen(toy.Classifier):
    """Learning rate 0: every gradient can be computed by hand at the initial weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def window_sums(stop):
    """A_l and the number of counted steps of the unfinished window, from the state."""
    state = stop.state_dict()["window"]
    return [state["sums"][key] for key in sorted(state["sums"], key=int)], int(state["counted"])


def sums_by_hand(batches, autocast_dtype=None):
    """Sum over optimizer steps of the mean-loss gradient; `batches` is a list of joined batches."""
    model = Frozen()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches:
        with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
            loss = nn.functional.cross_entropy(model.net(x).float(), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        total = [t + g for t, g in zip(total, grads, strict=True)]
    return total


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("precision", "rtol"),
    [
        ("32-true", 1e-5),
        ("bf16-mixed", 2e-2),
        ("bf16-true", 5e-2),
        ("16-mixed", 5e-3),
    ],
)
def test_window_sums_are_autograds(tmp_path, precision, rtol, accumulate, clip):
    stop = PopRiskEarlyStopping(window=100, action="monitor")
    is_fp16 = precision == "16-mixed"
    settings = {"plugins": [scaler_on_cpu()]} if is_fp16 else {"precision": precision}
    trainer = toy.trainer(
        tmp_path,
        [stop],
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        **settings,
    )
    trainer.fit(Frozen(), toy.loader())

    sums, counted = window_sums(stop)
    assert counted == trainer.global_step == 8 // accumulate
    # Micro-batches are of equal size, so their mean is the gradient of the joined batch.
    expected = sums_by_hand(toy.loader(batch_size=32 * accumulate))
    for found, by_hand in zip(sums, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, by_hand, rtol=0, atol=rtol * float(by_hand.norm()))


def test_a_window_spans_the_same_bits_as_the_hook_saw(tmp_path):
    stop, recorder = PopRiskEarlyStopping(window=100, action="monitor"), Recorder()
    trainer = toy.trainer(tmp_path, [recorder, stop], max_epochs=2, gradient_clip_val=1e-3)
    trainer.fit(toy.Classifier(), toy.loader())
    sums, _ = window_sums(stop)
    expected = [torch.zeros_like(g) for g in recorder.grads[0]]
    for grads in recorder.grads:
        expected = [t + g for t, g in zip(expected, grads, strict=True)]
    toy.assert_same(sums, expected)


class TestShortSteps:
    """8 micro-batches by 3: the third step of an epoch has 2, each divided by 3."""

    def test_are_the_mean_of_their_own_examples(self, tmp_path):
        stop = PopRiskEarlyStopping(window=100, action="monitor")
        trainer = toy.trainer(tmp_path, [stop], max_epochs=1, accumulate_grad_batches=3)
        trainer.fit(Frozen(), toy.loader())
        sums, counted = window_sums(stop)
        assert trainer.global_step == counted == 3
        # Steps of 96, 96 and 64 examples, each the gradient of their mean loss.
        expected = sums_by_hand(toy.loader(batch_size=96))
        for found, by_hand in zip(sums, expected, strict=True):
            torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5 * float(by_hand.norm()))

    def test_the_ratio_is_that_of_joined_batches(self, tmp_path):
        """F and U of a run with short steps equal those of their joined batches."""
        ratios = []
        for batch_size, accumulate in ((32, 3), (96, 1)):
            stop = PopRiskEarlyStopping(window=6, action="monitor")
            trainer = toy.trainer(
                tmp_path, [stop], max_epochs=2, accumulate_grad_batches=accumulate
            )
            trainer.fit(Frozen(), toy.loader(batch_size=batch_size))
            (record,) = stop.history
            assert record["risk_decrease"] is None  # no weight moved
            ratios.append({k: v for k, v in record.items() if v is not None})
        assert ratios[0]["step"] == 6
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)

    def test_count_as_training_time(self, tmp_path):
        stop = PopRiskEarlyStopping(window=100, action="monitor")
        trainer = toy.trainer(tmp_path, [stop], max_epochs=2, accumulate_grad_batches=3)
        trainer.fit(toy.Classifier(toy.sgd), toy.loader())
        assert stop.state_dict()["rule"]["lr_sum"] == pytest.approx(6 * 0.5)

    def test_an_epoch_shorter_than_the_accumulation_is_a_mean_too(self, tmp_path):
        stop = PopRiskEarlyStopping(window=100, action="monitor")
        trainer = toy.trainer(tmp_path, [stop], max_epochs=3, accumulate_grad_batches=20)
        trainer.fit(Frozen(), toy.loader())
        sums, counted = window_sums(stop)
        assert trainer.global_step == counted == 3
        (whole,) = toy.loader(batch_size=256)
        for found, by_hand in zip(sums, sums_by_hand([whole] * 3), strict=True):
            torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5 * float(by_hand.norm()))

    def test_a_skipped_training_step_is_left_out(self, tmp_path):
        class Skips(Frozen):
            def training_step(self, batch, batch_idx):
                return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        stop = PopRiskEarlyStopping(window=100, action="monitor")
        with pytest.warns(UserWarning, match="returned `None`"):
            toy.trainer(tmp_path, [stop], max_epochs=1).fit(Skips(), toy.loader())
        assert window_sums(stop)[1] == 7


class TestLossScaling:
    """fp16 with a gradient scaler, on CPU."""

    def test_skipped_steps_count_neither_in_the_window_nor_as_time(self, tmp_path):
        # The first scales overflow fp16; each skip halves the scale.
        plugin = scaler_on_cpu(init_scale=2.0**24, backoff_factor=2.0**-4)
        stop = PopRiskEarlyStopping(window=100, action="monitor")
        applied = []

        class Counted(toy.Classifier):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
                optimizer.register_step_post_hook(lambda *_: applied.append(1))
                return optimizer

        trainer = toy.trainer(tmp_path, [stop], max_epochs=2, plugins=[plugin])
        trainer.fit(Counted(), toy.loader())
        assert trainer.global_step == 16
        assert 0 < len(applied) < 16  # Lightning counts skipped steps as steps
        assert window_sums(stop)[1] == len(applied)
        assert stop.state_dict()["rule"]["lr_sum"] == pytest.approx(0.5 * len(applied))
        assert all(t.isfinite().all() for t in window_sums(stop)[0])

    def test_a_window_without_finite_steps_is_no_window(self, tmp_path):
        plugin = scaler_on_cpu(init_scale=2.0**127, backoff_factor=0.999)
        stop = PopRiskEarlyStopping(window=4, action="monitor")
        trainer = toy.trainer(tmp_path, [stop], max_epochs=1, plugins=[plugin])
        with pytest.warns(UserWarning, match="step 4 had fewer than four steps") as warned:
            trainer.fit(toy.Classifier(), toy.loader())
        assert len([w for w in warned if "had fewer than" in str(w.message)]) == 1  # of 2 windows
        rule = stop.state_dict()["rule"]
        assert (rule["windows"], rule["lr_sum"]) == (0, 0.0)
        assert "poprisk/signal_ratio" not in stop.metrics()

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_those_that_fused_optimizers_see_scaled_are_unscaled(self, tmp_path, accumulate):
        class Fused(Frozen):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.0, fused=True)

        stop, recorder = PopRiskEarlyStopping(window=100, action="monitor"), Recorder()
        trainer = toy.trainer(
            tmp_path,
            [stop, recorder],
            max_epochs=1,
            plugins=[scaler_on_cpu()],
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(Fused(), toy.loader())
        sums, counted = window_sums(stop)
        assert counted == trainer.global_step
        scaled = torch.stack([torch.stack([g.norm() for g in grads]) for grads in recorder.grads])
        assert float(scaled.mean()) > 10.0  # the hook's gradients still are
        expected = sums_by_hand(toy.loader(batch_size=32 * accumulate))
        for found, by_hand in zip(sums, expected, strict=True):
            torch.testing.assert_close(found, by_hand, rtol=0, atol=5e-3 * float(by_hand.norm()))

    def test_steps_that_a_fused_optimizer_skips_count_for_nothing(self, tmp_path):
        plugin = scaler_on_cpu(init_scale=2.0**24, backoff_factor=2.0**-4)
        stop = PopRiskEarlyStopping(window=100, action="monitor")
        model = toy.Classifier(lambda p: torch.optim.AdamW(p, lr=0.5, fused=True))
        trainer = toy.trainer(tmp_path, [stop], max_epochs=2, plugins=[plugin])
        trainer.fit(model, toy.loader())
        (applied,) = {int(s["step"]) for s in trainer.optimizers[0].state.values()}
        assert 0 < applied < trainer.global_step == 16
        assert window_sums(stop)[1] == applied
        assert stop.state_dict()["rule"]["lr_sum"] == pytest.approx(0.5 * applied)

    def test_fused_optimizers_without_a_scaler_are_fine(self, tmp_path):
        model = toy.Classifier(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))
        stop = PopRiskEarlyStopping(window=8)
        toy.trainer(tmp_path, [stop]).fit(model, toy.loader())
        assert stop.stopped_step is not None

    def test_stops_like_the_unscaled_run(self, tmp_path):
        stop = PopRiskEarlyStopping(window=8)
        toy.trainer(tmp_path, [stop], plugins=[scaler_on_cpu()]).fit(toy.Classifier(), toy.loader())
        assert stop.stopped_step == 45


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make_optimizer", [toy.adamw, toy.gated])
def test_stops_in_bfloat16(tmp_path, precision, make_optimizer):
    kappa = 2.0
    steps = []
    for settings in ({}, {"precision": precision}):
        stop = PopRiskEarlyStopping(kappa=kappa, window=8)
        toy.trainer(tmp_path, [stop], max_epochs=20, **settings).fit(
            toy.Classifier(make_optimizer), toy.loader()
        )
        steps.append(stop.stopped_step)
    assert steps[1] == pytest.approx(steps[0], abs=6)


def test_unfreezing_a_layer_starts_the_window_afresh(tmp_path):
    class Unfreezes(Frozen):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 1)

    stop = PopRiskEarlyStopping(window=100, action="monitor")
    toy.trainer(tmp_path, [stop], max_epochs=2).fit(Unfreezes(), toy.loader())
    sums, counted = window_sums(stop)
    assert counted == 8
    assert [t.shape for t in sums] == [p.shape for p in Frozen().parameters()]
