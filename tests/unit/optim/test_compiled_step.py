"""torch.compile of a step, or of a training step that calls it: the numbers of the plain step."""

import copy

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params
from tests.unit.optim.paths import EAGER, FLAGS, needs_compiler

STEPS = 5
# Inductor imports what torch itself has deprecated.
_INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Nothing is compiled a second time, neither for a later step nor for a changed number."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def assert_same(actual, expected):
    """Parameters and states, bit for bit."""
    for a, b in zip(actual[0], expected[0], strict=True):
        assert torch.equal(a, b)
    ours, theirs = (optimizer.state_dict()["state"] for _, optimizer in (actual, expected))
    assert ours.keys() == theirs.keys()
    for index, state in theirs.items():
        assert state["step"] > 0
        for key, value in state.items():
            assert torch.equal(ours[index][key], value), (index, key)


class Loop:
    """A small net and one training step on given data, compiled or not."""

    def __init__(self, make, compiled=False, backend="eager", passes=1, width=8):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        )
        self.optimizer = make(self.net.parameters())
        self.passes = passes
        self.step = torch.compile(self._step, backend=backend) if compiled else self._step
        self.data = torch.Generator().manual_seed(1)

    def _step(self, x):
        for _ in range(self.passes):
            (self.net(x).square().mean() / self.passes).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps=STEPS, after=lambda: None):
        for _ in range(steps):
            self.step(torch.randn(16, 8, generator=self.data))
            after()
        return [p.detach() for p in self.net.parameters()], self.optimizer


LOOPS = {
    **{impl: (lambda p, impl=impl: PopRiskAdamW(p, lr=1e-2, **FLAGS[impl]), {}) for impl in EAGER},
    # a kernel that Dynamo does not see
    "fused": (lambda p: PopRiskAdamW(p, lr=1e-2, fused=True), {}),
    "paper": (lambda p: PopRiskAdamW.paper(p, lr=1e-2), {}),
    # the hooks that see the pieces are called by the compiled step's backward
    "microbatch": (lambda p: PopRiskAdamW(p, noise_source="microbatch"), {"passes": 2}),
    "8bit": (lambda p: PopRiskAdamW(p, lr=1e-2, state_dtype="8bit"), {"width": 512}),
    "inductor": (lambda p: PopRiskAdamW(p, lr=1e-2), {"backend": "inductor"}),
}


_MARKS = {"inductor": _INDUCTOR, "fused": [needs_compiler]}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=_MARKS.get(kind, [])) for kind in LOOPS])
def test_a_compiled_training_step(kind):
    make, kwargs = LOOPS[kind]
    compiled, plain = (Loop(make, is_compiled, **kwargs).run() for is_compiled in (True, False))
    assert_same(compiled, plain)


@_INDUCTOR[1]
@pytest.mark.parametrize("impl", EAGER)
def test_a_compiled_step_is_the_step(impl):
    """A region without a model: nothing but the step, so that no C++ is compiled."""
    runs = []
    for compile_ in (torch.compile, lambda step: step):
        params = make_params()
        options = {"lr": 1e-2, "gate_blend": 0.5, "collect_stats_every": 1}
        optimizer = PopRiskAdamW(params, **options, **FLAGS[impl])
        step = compile_(optimizer.step)
        for row in gradients(STEPS):
            feed(params, row)
            step()
        runs.append((params, optimizer))
    assert_same(*runs)
    assert runs[0][1].gate_stats() == runs[1][1].gate_stats()


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_a_schedule_compiles_nothing_anew(lr):
    """torch's own optimizers compile again at each new float; `error_on_recompile` would tell."""

    def run(compiled):
        loop = Loop(lambda p: PopRiskAdamW(p, lr=copy.deepcopy(lr)), compiled)
        schedule = torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, max_lr=0.1, total_steps=9)
        return loop.run(after=schedule.step)

    assert_same(run(True), run(False))


def test_a_closure_is_compiled_and_the_step_within_it_is_not():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def run(compiled):
        loop = Loop(lambda p: PopRiskAdamW(p, lr=1e-2))

        def closure():
            loss = loop.net(torch.ones(4, 8)).square().mean()
            value = loss.detach()
            grads = torch.autograd.grad(loss, list(loop.net.parameters()))
            for param, grad in zip(loop.net.parameters(), grads, strict=True):
                param.grad = grad
            return value

        step = loop.optimizer.step
        step = torch.compile(step, backend=backend) if compiled else step
        losses = [float(step(closure)) for _ in range(STEPS)]
        return losses, ([p.detach() for p in loop.net.parameters()], loop.optimizer)

    (losses, after), (expected, plain) = run(True), run(False)
    assert losses == expected
    assert_same(after, plain)
    operations = " ".join(str(graph.code) for graph in graphs)
    assert "linear" in operations
    assert "lerp" not in operations


@pytest.mark.parametrize(
    "before",
    [
        lambda optimizer: optimizer.init_state(),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        lambda optimizer: optimizer.gate_stats(),
        lambda optimizer: optimizer.gate_sums(),
    ],
    ids=["init_state", "load_state_dict", "gate_stats", "gate_sums"],
)
def test_other_methods_in_a_compiled_region(before):
    def run(compiled):
        loop = Loop(lambda p: PopRiskAdamW(p, lr=1e-2, collect_stats_every=1))
        plain = loop._step

        def step(x):
            before(loop.optimizer)
            plain(x)

        loop.step = torch.compile(step, backend="eager") if compiled else step
        return loop.run()

    assert_same(run(True), run(False))
