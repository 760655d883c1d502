"""Noise from micro-batches and ranks under gloo DDP, and the refusals of other strategies.

The three sources are compared with the true variance of the gradient of the batch mean on a model
whose weights stay where they are (lr=0) and whose data are i.i.d.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import deviation_scale
from poprisk_integrations.optim._flat_reduce import same_on_all_ranks, sum_over_ranks
from tests.helpers.gloo import spawn_gloo

pytestmark = pytest.mark.distributed

WORLD, PASSES, SIZE, STEPS = 2, 4, 4, 250
BATCH = WORLD * PASSES * SIZE
BETA1, RHO = 0.9, 0.99


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def population(examples, seed, dtype=torch.float32):
    """Targets with noise: every example has a gradient of its own, the mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator)
    y = x[:, :4] + torch.randn(examples, 4, generator=generator)
    return x.to(dtype), y.to(dtype)


def true_variance():
    """Variance of the gradient of a mean over BATCH i.i.d. examples, per example in float64."""
    model = make_model(torch.float64)
    x, y = population(20_000, seed=9, dtype=torch.float64)

    def loss(params, xi, yi):
        return (functional_call(model, params, xi) - yi).square().mean()

    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([r.var(0).reshape(-1) for r in rows.values()]) / BATCH


def measure(source, rank=0, world=1, steps=STEPS, clip=None, **options):
    """Train at lr=0 with DDP if world > 1; returns s and its count, and a rank's own view."""
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = PopRiskAdamW(
        model.parameters(),
        lr=0.0,
        weight_decay=0.0,
        betas=(BETA1, 0.999),
        rho=RHO,
        noise_source=source,
        **options,
    )
    x, y = population(steps * BATCH, seed=1)
    rows = torch.arange(steps * BATCH).view(steps, world, -1)[:, rank]
    parts = PASSES * WORLD // world if source == "microbatch" else PASSES
    for step in range(steps):
        optimizer.zero_grad()
        chunks = rows[step].chunk(parts)
        for k, chunk in enumerate(chunks):
            if world > 1 and hasattr(wrapped, "require_backward_grad_sync"):
                wrapped.require_backward_grad_sync = k == len(chunks) - 1
            nn.functional.mse_loss(wrapped(x[chunk]), y[chunk]).div(len(chunks)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    states = [optimizer.state[p] for p in model.parameters()]
    return {
        "s": torch.cat([s["exp_dev_sq"].reshape(-1) for s in states]).double(),
        "count": states[0]["dev_step"].item(),
    }


def corrected(result):
    """Variance estimate: s without its start at zero and without the scale of deviations."""
    return result["s"] / (1 - RHO ** result["count"]) / deviation_scale(BETA1)


def ratio(estimate, truth):
    """Mean over coordinates of estimate/truth."""
    return float((estimate / truth).mean())


def all_ranks(rank, world_size):
    """Everything that two processes are needed for: starting them is most of the time."""
    return {
        "microbatch": measure("microbatch", rank, world_size),
        "ranks": measure("ranks", rank, world_size),
        "clipped": measure("microbatch", rank, world_size, clip=0.05, steps=30),
        "moving": moving_rank(rank, world_size),
        "refusals": refusals_rank(rank, world_size),
        "reduction": reduction_rank(rank, world_size),
    }


@pytest.fixture(scope="module")
def ranks():
    return spawn_gloo(WORLD, all_ranks)


@pytest.fixture(scope="module")
def alone():
    return measure("microbatch")


# Of 250 steps an EMA of rho=0.99 weighs what (1+rho)/(1-rho) * tanh(1.25) = 169 equal ones do. A
# step with N Gaussian pieces has a relative variance 2/(N-1) (temporal: 2), so one coordinate is
# within sqrt(2/(N-1)/169): 11 % (temporal, ranks) or 4 % (8 pieces). The 164 coordinates share
# hidden units: as few as 10 may be independent, which leaves 3.4 % and 1.3 % for their mean. The
# bounds are three of these.
BOUNDS = {"temporal": 0.10, "ranks": 0.10, "microbatch": 0.04}


def test_all_sources_estimate_the_true_variance(ranks, alone):
    truth = true_variance()
    found = {
        "temporal": measure("temporal"),
        "ranks": ranks[0]["ranks"],
        "microbatch": alone,
    }
    for source, result in found.items():
        assert ratio(corrected(result), truth) == pytest.approx(1.0, abs=BOUNDS[source]), source


def test_two_ranks_of_four_passes_are_eight_pieces(ranks, alone):
    """The same pieces in one process: only the order of additions differs."""
    torch.testing.assert_close(ranks[0]["microbatch"]["s"], alone["s"], rtol=1e-3, atol=1e-9)


def test_clipping_reaches_the_pieces_of_all_ranks(ranks):
    one, unclipped = (measure("microbatch", clip=clip, steps=30)["s"] for clip in (0.05, None))
    torch.testing.assert_close(ranks[0]["clipped"]["s"], one, rtol=1e-3, atol=1e-12)
    assert float(one.mean()) < 0.1 * float(unclipped.mean())


@pytest.mark.parametrize("run", ["microbatch", "ranks", "clipped"])
def test_replicas_hold_the_same_bits(ranks, run):
    one, other = (r[run] for r in ranks)
    assert torch.equal(one["s"], other["s"])
    assert one["count"] == other["count"]


def moving_rank(rank, world_size):
    """Unused parameters on one rank, a skipped step, and lr > 0: replicas must stay together."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(3, 2)})

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x, use_b):
            out = self.layers["a"](x)
            return out + self.layers["b"](x) if use_b else out

    wrapped = nn.parallel.DistributedDataParallel(Routed(), find_unused_parameters=True)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, noise_source="ranks", rho=0.9)
    generator = torch.Generator().manual_seed(rank)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=generator)
        loss = wrapped(x, use_b=rank == 0).square().mean()
        (loss * float("nan") if step == 3 and rank == 1 else loss).backward()
        optimizer.step()
    states = [optimizer.state[p] for n in "ab" for p in model[n].parameters()]
    return {
        "noise": [s["exp_dev_sq"] for s in states],
        "weights": [p.detach() for p in model.parameters()],
        "counts": [s["dev_step"].item() for s in states],
        "skipped": optimizer.skipped_nonfinite,
        "unused": len(optimizer.state),
    }


def test_unused_parameters_and_skips_keep_replicas_together(ranks):
    one, other = (r["moving"] for r in ranks)
    for key in ("noise", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True))
    assert one["counts"] == other["counts"] == [5.0] * 4
    assert one["skipped"] == other["skipped"] == 1
    assert one["unused"] == 4
    assert all((s > 0).all() for s in one["noise"])


def refused(make, error):
    try:
        make()
    except error as caught:
        return str(caught)
    return "accepted"


def refusals_rank(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    messages = {}
    mesh = init_device_mesh("cpu", (world_size,))

    model = make_model()
    fully_shard(model, mesh=mesh)
    messages["fsdp2"] = refused(
        lambda: PopRiskAdamW(model.named_parameters(), noise_source="ranks"), ValueError
    )

    def two_steps(net, params, source, passes=2):
        optimizer = PopRiskAdamW(params, lr=1e-2, noise_source=source)
        torch.manual_seed(rank)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(passes):
                net(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()

    for flat in (True, False):
        net = FullyShardedDataParallel(
            make_model(), device_id=torch.device("cpu"), use_orig_params=not flat
        )
        messages[f"fsdp1 {flat}"] = refused(
            lambda net=net: two_steps(net, net.parameters(), "microbatch"), RuntimeError
        )
    net = make_model()  # nobody reduces its gradients
    messages["alone"] = refused(lambda: two_steps(net, net.parameters(), "ranks"), RuntimeError)
    part = [p for i, p in enumerate(net.parameters()) if i % world_size == rank]  # as ZeRO does
    messages["zero"] = refused(lambda: two_steps(net, part, "microbatch"), RuntimeError)
    return messages


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp2", "Invalid noise_source: 'ranks' for '0.weight'"),
        ("fsdp1 True", "Use noise_source='temporal'"),
        ("fsdp1 False", "Use noise_source='temporal'"),
        ("alone", "needs gradients that are averaged over ranks"),
        ("zero", "needs the same parameters on all ranks"),
    ],
)
def test_strategies_that_hide_pieces_are_refused(ranks, strategy, message):
    for result in ranks:
        assert message in result["refusals"][strategy]


def reduction_rank(rank, world_size):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 2), (), (0, 4), (7,), (2, 2, 2)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors.append(torch.full((2,), 1.0 + rank, dtype=torch.float64))
    results = [sum_over_ranks(tensors, bucket_elements=size) for size in (1, 8, 10**6)]
    agree = [same_on_all_ranks([5, n], torch.device("cpu")) for n in (3, rank)]
    return {"own": tensors, "sums": results, "agree": agree}


def test_flat_reduction(ranks):
    one, other = (r["reduction"] for r in ranks)
    expected = [a + b for a, b in zip(one["own"], other["own"], strict=True)]
    for sums in one["sums"] + other["sums"]:
        for found, total in zip(sums, expected, strict=True):
            assert found.shape == total.shape
            assert torch.equal(found, total)
    assert one["agree"] == other["agree"] == [True, False]
