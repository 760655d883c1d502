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
from poprisk_integrations.distributed import same_on_all_ranks, sum_over_ranks

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


def ratio(result, truth):
    """Mean over coordinates of the estimate (s without its start at zero and scale) over truth."""
    estimate = result["s"] / (1 - RHO ** result["count"]) / deviation_scale(BETA1)
    return float((estimate / truth).mean())


def microbatch(rank, world_size, folder):
    return measure("microbatch", rank, world_size)


def ranks(rank, world_size, folder):
    return measure("ranks", rank, world_size)


def clipped(rank, world_size, folder):
    return measure("microbatch", rank, world_size, clip=0.05, steps=30)


@pytest.fixture(scope="module")
def alone():
    return measure("microbatch")


# Of 250 steps an EMA of rho=0.99 weighs what (1+rho)/(1-rho) * tanh(1.25) = 169 equal ones do. A
# step with N Gaussian pieces has a relative variance 2/(N-1) (temporal: 2), so one coordinate is
# within sqrt(2/(N-1)/169): 11 % (temporal, ranks) or 4 % (8 pieces). The 164 coordinates share
# hidden units: as few as 10 may be independent, which leaves 3.4 % and 1.3 % for their mean. The
# bounds are three of these.
BOUNDS = {"temporal": 0.10, "ranks": 0.10, "microbatch": 0.04}


def test_all_sources_estimate_the_true_variance(results, alone):
    truth = true_variance()
    found = {"temporal": measure("temporal"), "ranks": results(2, ranks)[0], "microbatch": alone}
    for source, result in found.items():
        assert ratio(result, truth) == pytest.approx(1.0, abs=BOUNDS[source]), source


def test_two_ranks_of_four_passes_are_eight_pieces(results, alone):
    """The same pieces in one process: only the order of additions differs."""
    two = results(2, microbatch)[0]
    torch.testing.assert_close(two["s"], alone["s"], rtol=1e-3, atol=1e-9)


def test_clipping_reaches_the_pieces_of_all_ranks(results):
    one, unclipped = (measure("microbatch", clip=clip, steps=30)["s"] for clip in (0.05, None))
    torch.testing.assert_close(results(2, clipped)[0]["s"], one, rtol=1e-3, atol=1e-12)
    assert float(one.mean()) < 0.1 * float(unclipped.mean())


@pytest.mark.parametrize("job", [microbatch, ranks, clipped])
def test_replicas_hold_the_same_bits(results, job):
    one, other = results(2, job)
    assert torch.equal(one["s"], other["s"])
    assert one["count"] == other["count"]


def moving(rank, world_size, folder):
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


def test_unused_parameters_and_skips_keep_replicas_together(results):
    one, other = results(2, moving)
    for key in ("noise", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True))
    assert one["counts"] == other["counts"] == [5.0] * 4
    assert one["skipped"] == other["skipped"] == 1
    assert one["unused"] == 4
    assert all((s > 0).all() for s in one["noise"])


def two_steps(net, params, source):
    """What the optimizer says of this source of noise."""
    try:
        optimizer = PopRiskAdamW(params, lr=1e-2, noise_source=source)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                net(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


def refusals(rank, world_size, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    said, cpu = {}, torch.device("cpu")
    net = make_model()
    fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    said["fsdp2"] = two_steps(net, net.named_parameters(), "ranks")
    for kind, is_original in (("fsdp1", True), ("fsdp1 flat", False)):
        net = FullyShardedDataParallel(make_model(), device_id=cpu, use_orig_params=is_original)
        said[kind] = two_steps(net, net.parameters(), "microbatch")
    net = make_model()  # nobody reduces its gradients
    torch.manual_seed(rank)
    said["alone"] = two_steps(net, net.parameters(), "ranks")
    part = [p for i, p in enumerate(net.parameters()) if i % world_size == rank]  # as ZeRO does
    said["zero"] = two_steps(net, part, "microbatch")
    return said


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp2", "Invalid noise_source: 'ranks' for '0.weight'"),
        ("fsdp1", "Use noise_source='temporal'"),
        ("fsdp1 flat", "Use noise_source='temporal'"),
        ("alone", "needs gradients that are averaged over ranks"),
        ("zero", "needs the same parameters on all ranks"),
    ],
)
def test_strategies_that_hide_pieces_are_refused(results, strategy, message):
    for said in results(2, refusals):
        assert message in said[strategy]


def reduction(rank, world_size, folder):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 2), (), (0, 4), (7,), (2, 2, 2)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors.append(torch.full((2,), 1.0 + rank, dtype=torch.float64))
    sums = [sum_over_ranks(tensors, bucket_elements=size) for size in (1, 8, 10**6)]
    agree = [same_on_all_ranks([5, n], torch.device("cpu")) for n in (3, rank)]
    return {"own": tensors, "sums": sums, "agree": agree}


def test_flat_reduction(results):
    one, other = results(2, reduction)
    expected = [a + b for a, b in zip(one["own"], other["own"], strict=True)]
    for sums in one["sums"] + other["sums"]:
        for found, total in zip(sums, expected, strict=True):
            assert found.shape == total.shape
            assert torch.equal(found, total)
    assert one["agree"] == other["agree"] == [True, False]


JOBS = {2: [microbatch, ranks, clipped, moving, refusals, reduction]}
