"""torch.compile of a step, or of a training step that calls it: the numbers of the plain step."""

import copy
import io

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from tests.helpers.optim_problem import feed, gradients, make_params
from tests.unit.optim.torch_generic.optimizer_info import EAGER, EVERY, flags, inputs

STEPS = 6
# Inductor imports what torch itself has deprecated.
_INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Nothing is compiled a second time, neither for a later step nor for a changed number."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def trajectory(make, compiled, dtype=torch.float32, steps=STEPS):
    """(parameters, optimizer) after steps whose gradients are given."""
    params = make_params(dtype)
    optimizer = make(params)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for row in gradients(steps, dtype):
        feed(params, row)
        step()
    return params, optimizer


def assert_same(actual, expected):
    """Parameters and states, bit for bit."""
    for a, b in zip(actual[0], expected[0], strict=True):
        assert torch.equal(a, b)
    ours, theirs = (optimizer.state_dict()["state"] for _, optimizer in (actual, expected))
    assert ours.keys() == theirs.keys()
    for index, state in theirs.items():
        assert state["step"] > 0
        assert ours[index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(ours[index][key], value), (index, key)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize(
    "options", inputs("lr", "tensor lr", "decay", "maximize", "betas", "gated decay")
)
def test_a_compiled_step_is_the_step(impl, options):
    chosen = flags(impl, **{"lr": 1e-2, **options})
    make = lambda params: PopRiskAdamW(params, **copy.deepcopy(chosen))  # noqa: E731
    plain, compiled = (trajectory(make, is_compiled) for is_compiled in (False, True))
    assert_same(compiled, plain)
    assert compiled[1].gate_stats() == plain[1].gate_stats()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.float32, {"state_dtype": "bfloat16"}),
        (torch.float64, {"gate": "hard"}),
        (torch.complex64, {}),
    ],
    ids=str,
)
def test_a_compiled_step_of_other_formats(dtype, options):
    make = lambda params: PopRiskAdamW(params, lr=1e-2, fused=False, **options)  # noqa: E731
    assert_same(trajectory(make, True, dtype), trajectory(make, False, dtype))


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


def assert_loops_agree(make, **kwargs):
    compiled, plain = (Loop(make, is_compiled, **kwargs).run() for is_compiled in (True, False))
    assert_same(compiled, plain)


@pytest.mark.parametrize("impl", EVERY)
def test_a_compiled_training_step(impl):
    """`fused` compiles its own pass within the compiled region."""
    chosen = flags(impl, lr=1e-2)
    assert_loops_agree(lambda params: PopRiskAdamW(params, **chosen))


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (lambda p: PopRiskAdamW.paper(p, lr=1e-2), {}),
        # the hooks that see the pieces are called by the compiled step's backward
        (lambda p: PopRiskAdamW(p, lr=1e-2, noise_source="microbatch"), {"passes": 2}),
        (lambda p: PopRiskAdamW(p, lr=1e-2, state_dtype="8bit"), {"width": 512}),
        pytest.param(lambda p: PopRiskAdamW(p, lr=1e-2), {"backend": "inductor"}, marks=_INDUCTOR),
        pytest.param(
            lambda p: PopRiskAdamW(p, lr=1e-2, capturable=True, fused=True),
            {"backend": "inductor"},
            marks=_INDUCTOR,
        ),
    ],
    ids=["paper", "microbatch", "8bit", "inductor", "inductor, fused"],
)
def test_a_compiled_training_step_of_other_kinds(make, kwargs):
    assert_loops_agree(make, **kwargs)


@_INDUCTOR[1]
def test_inductor():
    """A region without a model: nothing but the step, so that no C++ is compiled."""
    params = make_params()
    twins = copy.deepcopy(params)
    optimizer, plain = PopRiskAdamW(params, lr=1e-2), PopRiskAdamW(twins, lr=1e-2)
    step = torch.compile(optimizer.step)
    for row in gradients(STEPS):
        feed(params, row)
        feed(twins, row)
        step()
        plain.step()
    assert_same((params, optimizer), (twins, plain))


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_a_schedule_compiles_nothing_anew(lr):
    """torch's own optimizers compile again at each new float; `error_on_recompile` would tell."""

    def run(compiled):
        loop = Loop(lambda p: PopRiskAdamW(p, lr=copy.deepcopy(lr)), compiled)
        schedule = torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, max_lr=0.1, total_steps=9)
        return loop.run(after=schedule.step)

    assert_same(run(True), run(False))


def test_a_checkpoint_of_compiled_steps_continues():
    def run(compiled):
        make = lambda p: PopRiskAdamW(p, lr=1e-2)  # noqa: E731
        first = Loop(make, compiled)
        first.run(3)
        file = io.BytesIO()
        torch.save([first.net.state_dict(), first.optimizer.state_dict()], file)
        file.seek(0)
        second = Loop(make, compiled)
        model, states = torch.load(file, weights_only=True)
        second.net.load_state_dict(model)
        second.optimizer.load_state_dict(states)
        second.data = first.data
        torch._dynamo.reset()  # another net is compiled again, as in another process
        return second.run(3)

    expected = Loop(lambda p: PopRiskAdamW(p, lr=1e-2)).run()
    assert_same(run(True), expected)
    assert_same(run(False), expected)


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
