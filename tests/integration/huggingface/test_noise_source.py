"""`optim_args="noise_source=..."` in real runs of Trainer."""

import pytest
import torch

import poprisk_integrations.huggingface  # noqa: F401 - registers the optimizer's name
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train

PASSES, SIZE = 4, 4


class EpochOrder:
    """Batches as Trainer's sampler draws them, read off the model."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs):
        self.seen.append((kwargs["x"], kwargs["labels"]))


def variance_by_hand(batches):
    """Variance of the mean over micro-batches, in float64, at the initial weights."""
    model = TinyModel().double()
    rows = []
    for x, y in batches:
        loss = model(x.double(), y.double())["loss"]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    return torch.stack(rows).var(0) / len(batches)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_micro_batches_of_gradient_accumulation(tmp_path, max_grad_norm):
    """One step: s is the variance over the micro-batches, on the scale of the clipped mean."""
    model = TinyModel()
    order = EpochOrder(model)
    args = arguments(
        tmp_path,
        optim_args="noise_source=microbatch",
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=PASSES,
        max_grad_norm=max_grad_norm,
        logging_steps=1,
        max_steps=1,
    )
    trainer = train(args, model=model)
    optimizer = trainer.optimizer
    assert optimizer.param_groups[0]["noise_source"] == "microbatch"
    names = {id(p): n for n, p in model.named_parameters()}
    states = {names[id(p)]: s for p, s in optimizer.state.items()}
    found = torch.cat([states[n]["exp_dev_sq"].flatten() for n, _ in model.named_parameters()])
    expected = 0.01 * 2 / 1.9 * variance_by_hand(order.seen[:PASSES])
    if max_grad_norm:
        norm = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
        expected *= (max_grad_norm / norm) ** 2
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max())
    )


def test_epochs_that_end_on_one_micro_batch(tmp_path):
    """36 examples by 4 by 4: steps of 4, 4 and 1 micro-batches; the last says nothing of noise."""
    args = arguments(
        tmp_path,
        optim_args="noise_source=microbatch,no_gate=embed",
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=PASSES,
        save_strategy="steps",
        save_steps=2,
    )
    trainer = train(args, train_dataset=dataset(36))
    states = {n: trainer.optimizer.state[p] for n, p in trainer.model.named_parameters()}
    assert trainer.state.global_step == 6
    assert {s["step"].item() for s in states.values()} == {6}
    assert {n: s["dev_step"].item() for n, s in states.items()} == {
        n: 0.0 if "embed" in n else 4.0 for n in states
    }
    # A run may resume right before the short step.
    resumed = train(args, train_dataset=dataset(36), resume=str(tmp_path / "checkpoint-2"))
    for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_no_accumulation_is_refused(tmp_path):
    args = arguments(tmp_path, optim_args="noise_source=microbatch")
    with pytest.raises(RuntimeError, match="gradient accumulation steps to 2 or more"):
        train(args)
