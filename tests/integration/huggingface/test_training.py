"""The optimizer's names, its noise and its gate in real runs: train, save, resume, log."""

import pytest
import torch

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train, weights

PASSES, SIZE = 4, 4


@pytest.mark.parametrize(
    ("name", "optim_args"),
    [
        ("poprisk_adamw", "no_gate=embed,foreach=true"),
        ("poprisk_adamw_8bit", None),
        ("poprisk_adamw_paper", None),
    ],
)
def test_three_steps_save_and_resume(name, optim_args, tmp_path):
    options = {"optim": name, "optim_args": optim_args, "max_steps": 5}
    whole = train(arguments(tmp_path, save_strategy="steps", save_steps=3, **options))
    resumed = train(arguments(tmp_path, **options), resume=str(tmp_path / "checkpoint-3"))
    assert isinstance(whole.optimizer.optimizer, PopRiskAdamW)
    assert resumed.state.global_step == 5
    before, after = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert len(states[0]) == len(states[1]) == 6
    for index, state in states[0].items():
        noise = {"exp_dev_sq", "dev_step"} if name == "poprisk_adamw_paper" else set()
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | noise
        for key, value in state.items():
            other = states[1][index][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_an_adamw_run_continues_with_ours(tmp_path):
    train(
        arguments(tmp_path, optim="adamw_torch", max_steps=3, save_strategy="steps", save_steps=3)
    )
    args = arguments(tmp_path, max_steps=5, optim_args="noise_source=temporal")
    trainer = train(args, resume=True)
    assert trainer.state.global_step == 5
    state = next(iter(trainer.optimizer.state.values()))
    assert (float(state["step"]), float(state["dev_step"])) == (5.0, 2.0)


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


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def test_predicted_decrease_tells_the_loss(tmp_path):
    """Whole data as one batch, no gate and no momentum to speak of: a first-order step."""
    options = {"per_device_train_batch_size": 64, "learning_rate": 1e-4, "max_steps": 20}
    monitor = hf.PopRiskMonitorCallback(every_n_steps=1)
    args = arguments(tmp_path, logging_steps=1, optim_args="gate=none", max_grad_norm=0, **options)
    lines = lines_of(train(args, monitor))
    # The loss is taken before a step; the prediction of line t is of the step before it again.
    for before, here, after in zip(lines[5:], lines[6:], lines[7:], strict=False):
        drop = here["loss"] - after["loss"]
        assert here["poprisk/predicted_decrease"] == pytest.approx(drop, rel=0.1)
        assert before["loss"] > here["loss"]


def test_accumulated_steps_and_resume(tmp_path):
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    for steps in (4, 8):
        monitor = hf.PopRiskMonitorCallback(every_n_steps=2, per_layer=lambda name: name[0])
        args = arguments(tmp_path, max_steps=steps, **options)
        line = lines_of(train(args, monitor, resume=steps > 4))[-1]
        assert line["step"] == steps
        assert {"poprisk/e/mean_gate", "poprisk/h/signal_to_noise"} <= set(line)
        assert 0.0 < line["poprisk/open_fraction"] < 1.0
        assert not any(key.startswith("poprisk/group") for key in line)


@pytest.mark.parametrize(
    ("optim", "said"),
    [("sgd", "the optimizer has no gate"), ("poprisk_adamw", "no parameter is in a layer")],
)
def test_says_what_is_not_to_be_had(tmp_path, caplog, optim, said):
    monitor = hf.PopRiskMonitorCallback(every_n_steps=1, per_layer=lambda name: None)
    (line,) = lines_of(train(arguments(tmp_path, optim=optim, max_steps=4), monitor))
    assert said in caplog.text
    assert ("poprisk/open_fraction" in line) is (optim == "poprisk_adamw")
