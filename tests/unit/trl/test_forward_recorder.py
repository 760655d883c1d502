"""Which outputs are kept in each arrangement of policy and reference, and that hooks go away."""

import pytest
import torch
from torch import Tensor, nn

from poprisk_integrations.trl.forward_recorder import ForwardRecorder


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Wrapper(nn.Module):
    """Calls the module inside it, as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + 100.0


ONE = torch.tensor(1.0)


def hooks(*modules: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_two_models() -> None:
    policy, reference = Scale(2.0), Scale(3.0)
    with ForwardRecorder(policy, reference) as recorder:
        policy(ONE)
        reference(ONE)
    assert (recorder.policy_output, recorder.reference_output) == (2.0, 3.0)
    assert hooks(policy, reference) == 0


def test_same_module_twice() -> None:
    model = Scale(2.0)
    with ForwardRecorder(model, model) as recorder:
        model(ONE)
        model.factor = 5.0  # the adapter is off
        model(ONE)
        model(ONE * 7)  # further passes are not of interest
    assert (recorder.policy_output, recorder.reference_output) == (2.0, 5.0)
    assert hooks(model) == 0


def test_reference_inside_the_wrapper_of_the_policy() -> None:
    inner = Scale(2.0)
    policy = Wrapper(inner)
    with ForwardRecorder(policy, inner) as recorder:
        policy(ONE)
        inner.factor = 5.0
        inner(ONE)
    assert (recorder.policy_output, recorder.reference_output) == (102.0, 5.0)
    assert hooks(policy, inner) == 0


def test_no_reference_pass() -> None:
    model = Scale(2.0)
    with ForwardRecorder(model, model) as recorder:
        model(ONE)
    assert recorder.reference_output is None


def test_hooks_go_away_after_an_error() -> None:
    policy, reference = Scale(2.0), Scale(3.0)
    recorder = ForwardRecorder(policy, reference)
    with pytest.raises(TypeError), recorder:
        policy("not a tensor")
    assert hooks(policy, reference) == 0
