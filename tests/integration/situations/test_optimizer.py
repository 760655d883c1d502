"""Loops and handling of optimizers that public reports describe, run with PopRiskAdamW.

Each test names its report. Where torch's AdamW does the right thing, ours must do the same: with
`gate="none"` the parameters are compared.
"""

import copy
import io
import logging

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _scalars
from tests.unit.optim.conftest import _stand_ins  # noqa: F401 - of the parameter `impl`
from tests.unit.optim.paths import FLAGS, TORCH


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=1e-2, **options)


def ours(params, **options):
    """With the paper's third state."""
    return PopRiskAdamW(params, lr=1e-2, noise_source="temporal", **options)


def ungated(params, **options):
    return PopRiskAdamW(params, lr=1e-2, gate="none", fused=False, **options)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def backward(model, step):
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
    loss = model(x.to(next(model.parameters()).dtype)).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, before_step=lambda step: None):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        before_step(step)
        optimizer.step()
    return values(model)


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fresh(make):
    model = net()
    return model, make(model.parameters())


@pytest.mark.parametrize("make", [ours, ungated])
def test_the_optimizer_in_the_backward_pass(make):
    """pytorch#116975 (tutorial "optimizer step in backward"): one optimizer per parameter."""
    model = net()
    optimizers = {p: make([p]) for p in model.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step)
    for i in range(6):
        backward(model, i)
    reference = net()
    assert torch.equal(values(model), train(reference, make(reference.parameters()), range(6)))


def _init(optimizer):
    optimizer.init_state()


def _load(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def _step(optimizer):
    optimizer.step()


@pytest.mark.parametrize("call", [_init, _load, _step])
def test_states_from_inference_mode_can_be_trained_on(call):
    """pytorch/rfcs#55: "Inplace update to inference tensor outside InferenceMode".

    Lightning validates in inference mode, callbacks of the user included.
    """

    def run(mode):
        model, optimizer = fresh(ours)
        train(model, optimizer, range(0 if call is not _load else 2))
        if call is _step:
            backward(model, 0)
        with mode:
            call(optimizer)
        return train(model, optimizer, range(2, 6))

    assert torch.equal(run(torch.inference_mode()), run(torch.no_grad()))


def test_a_model_made_half_later_is_refused_as_at_the_start():
    """pytorch-lightning#16303: torch refuses it too ("expected dtype float for `end`")."""
    model, optimizer = fresh(ours)
    train(model, optimizer, range(2))
    before = values(model.half())
    with pytest.raises(RuntimeError, match=r"Invalid parameter dtype: torch\.float16"):
        train(model, optimizer, range(2, 3))
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"state_dtype": "bfloat16"}], ids=str)
def test_a_model_made_double_later_is_stepped_in_double(options):
    """pytorch#2138; torch refuses the step. A float32 state must not round the parameter."""
    model, optimizer = fresh(lambda params: ours(params, fused=False, **options))
    train(model, optimizer, range(3))
    model.double()
    reference = copy.deepcopy(model)
    twin = ours(reference.parameters(), fused=False, **options)  # its states are float64
    twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(model, optimizer, range(3, 6)), train(reference, twin, range(3, 6)))
    assert not torch.equal(values(model), values(model).float().double())


def test_states_follow_a_parameter_to_its_device():
    """pytorch#2830, pytorch-lightning#19955: `model.to(device)` after the optimizer was made."""
    here, there = torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(3, 4, device="meta"))
    optimizer = ours([there])
    moments = {key: here.clone() for key in ("exp_avg", "exp_avg_sq", "exp_dev_sq")}
    optimizer.state[there] = {**moments, "step": torch.ones(()), "dev_step": torch.ones(())}
    optimizer.init_state()
    assert {value.device.type for value in optimizer.state[there].values()} == {"meta"}


def resize(optimizer, rows):
    """Densify or prune as Gaussian splatting does: Adam's moments and the parameter, no more."""
    (old,) = optimizer.param_groups[0]["params"]
    state = optimizer.state.pop(old)

    def fit(tensor, fill):
        more = torch.full((max(rows - len(tensor), 0), 3), fill)
        return torch.cat([tensor[:rows], more])

    new = torch.nn.Parameter(fit(old.detach(), 1.0))
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = fit(state[key], 0.0)
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = state
    return new


def resized(make, rows, **options):
    """A parameter that is resized in the middle of its steps, and its state."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 150).view(50, 3))
    optimizer = make([param], **options)
    for step in range(8):
        if step == 4:
            param = resize(optimizer, rows)
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("rows", [30, 70])
def test_a_parameter_resized_with_adams_moments(impl, rows):
    """fvdb-reality-capture#84: the noise variance starts anew, and no foreign memory is read."""
    param, state = resized(ours, rows, **FLAGS[impl])
    assert state["exp_dev_sq"].shape == (rows, 3)
    assert state["dev_step"] == 4  # there is a mean to deviate from
    torch.testing.assert_close(param, resized(ours, rows, fused=False)[0], rtol=1e-6, atol=1e-7)


def test_a_resized_parameter_is_adamw_without_a_gate():
    assert torch.equal(resized(adamw, 70)[0], resized(ungated, 70)[0])


@pytest.mark.parametrize("impl", TORCH)
def test_a_parameter_resized_without_its_moments_is_refused(impl):
    """gaussian_splatting#32: the state was looked up under another key and left behind."""
    model, optimizer = fresh(lambda params: ours(params, **FLAGS[impl]))
    train(model, optimizer, range(2))
    model[2].weight.data = torch.ones(4, 8)
    model[2].bias.data = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"exp_avg has the shape \(2, 8\), its parameter \(4, 8"):
        train(model, optimizer, range(2, 3))


def _assign(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _materialise(model):
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())


@pytest.mark.parametrize(
    ("device", "replace"), [("cpu", _assign), ("meta", _materialise)], ids=["assign", "meta"]
)
def test_parameters_replaced_behind_the_optimizer_are_noticed(device, replace, caplog):
    """pytorch/tutorials#2522, pytorch-lightning#19067, pytorch#149205: AdamW is mute."""
    with torch.device(device):
        model = net()
    optimizer = ours(model.parameters())
    replace(model)
    with caplog.at_level(logging.WARNING, logger="poprisk_integrations"):
        for step in range(30):
            backward(model, step)
            optimizer.step()
    (record,) = caplog.records
    assert "no gradient in any" in record.getMessage()


def test_steps_without_gradients_are_not_reported_once_something_was_trained(caplog):
    model, optimizer = fresh(ours)
    train(model, optimizer, range(1))
    optimizer.zero_grad()
    for _ in range(30):
        optimizer.step()
    assert not caplog.records


def test_a_wrapper_that_keeps_its_tensors_in_our_state_can_resume():
    """over9000#8, pytorch_optimizer#310; timm's Lookahead keeps its slow weights there."""

    def lookahead(optimizer):
        for group in optimizer.param_groups:
            for param in group["params"]:
                state = optimizer.state[param]
                if "lookahead_slow_buff" not in state:
                    state["lookahead_slow_buff"] = param.detach().clone()
                slow = state["lookahead_slow_buff"]
                slow.add_(param.detach() - slow, alpha=0.5)
                param.data.copy_(slow)

    def run(stop):
        model, optimizer = fresh(ours)
        for step in range(8):
            train(model, optimizer, [step])
            if step % 2:
                lookahead(optimizer)
            if step == stop:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = ours(model.parameters())
                optimizer.load_state_dict(torch.load(file, weights_only=True))
        return values(model)

    assert torch.equal(run(stop=4), run(stop=None))


def test_sam_is_refused_by_name():
    """davda54/sam#65: SAM shares its groups with the optimizer, where its `rho` would be ours."""
    groups = [{"params": net().parameters(), "rho": 0.05, "adaptive": False}]
    with pytest.raises(ValueError, match="'adaptive' is an option of SAM"):
        ours(groups)


def test_states_are_not_made_while_a_graph_is_captured(monkeypatch):
    """pytorch#77862, burn#5779, torchtitan#4433: each replay would start from zero."""
    model, optimizer = fresh(lambda params: ours(params, capturable=True, fused=False))
    backward(model, 0)
    with monkeypatch.context() as patch:
        patch.setattr("poprisk_integrations.optim._states.is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="Run a step, or init_state"):
            optimizer.step()
        assert not any(optimizer.state.values())
    optimizer.init_state()
    made = {id(t) for state in optimizer.state.values() for t in state.values()}
    counter = optimizer._record.skipped
    with monkeypatch.context() as patch:
        patch.setattr("poprisk_integrations.optim._states.is_capturing", lambda device: True)
        for step in range(3):
            train(model, optimizer, [step])
    # a graph replays on the tensors that it was captured with
    assert {id(t) for state in optimizer.state.values() for t in state.values()} == made
    assert optimizer._record.skipped is counter
    assert not _scalars.is_capturing(torch.device("cpu"))


def test_a_skipped_step_is_counted_in_place():
    """As above: a graph must be able to count at each of its replays."""
    model, optimizer = fresh(ours)
    train(model, optimizer, range(2))
    counter = optimizer._record.skipped

    def spoil(step):
        model[0].bias.grad[0] = float("nan")

    train(model, optimizer, range(2, 4), before_step=spoil)
    assert optimizer.skipped_nonfinite == 2
    assert optimizer._record.skipped is counter


def test_accelerate_accumulates_and_skips():
    """accelerate#963, accelerate#2828: the wrapped step runs once per accumulation."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def run(make):
        AcceleratorState._reset_state(True)  # a Trainer of another test has set both
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(*fresh(make))
        for step in range(8):
            with accelerator.accumulate(model):
                x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
                accelerator.backward(model(x).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        counts = {int(state["step"]) for state in optimizer.state.values()}
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return values(model), counts

    expected, _ = run(adamw)
    found, counts = run(ungated)
    assert torch.equal(found, expected)
    assert counts == {4}


def freeze_and_thaw(model, optimizer):
    for step in range(8):
        model[0].requires_grad_(not 2 <= step < 5)
        train(model, optimizer, [step])


def zeroed_in_place(model, optimizer):
    for step in range(8):
        model[0].requires_grad_(not 2 <= step < 5)
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()


def averaged(model, optimizer):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    schedule = SWALR(optimizer, swa_lr=1e-3, anneal_epochs=3)
    for step in range(6):
        train(model, optimizer, [step])
        average.update_parameters(model)
        schedule.step()
    model.load_state_dict(average.module.state_dict())


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(torch.full((4, 6), float("inf") if step == 2 else 0.1 * step)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()


def functional(model, optimizer):
    params = dict(model.named_parameters())
    for step in range(6):
        x = torch.full((4, 6), 0.1 * step)

        def loss(tensors, x=x):
            return torch.func.functional_call(model, tensors, (x,)).square().mean()

        for name, grad in torch.func.grad(loss)(params).items():
            params[name].grad = grad
        optimizer.step()


def swapped(model, optimizer):
    """Memory of a parameter exchanged, and its layout, between steps."""
    for step in range(6):
        if step == 3:
            for param in model.parameters():
                param.data = param.data.clone()
            model[0].weight.data = model[0].weight.data.t().contiguous().t()
        train(model, optimizer, [step])


@pytest.mark.parametrize(
    "loop", [freeze_and_thaw, zeroed_in_place, averaged, scaled, functional, swapped]
)
def test_other_loops_are_adamws(loop):
    """Seen in many scripts: each gives AdamW's parameters, bit for bit."""
    runs = []
    for make in (adamw, ungated):
        model, optimizer = fresh(make)
        loop(model, optimizer)
        runs.append(values(model))
    assert torch.equal(*runs)
    assert runs[0].isfinite().all()
