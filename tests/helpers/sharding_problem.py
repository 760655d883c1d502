"""One small regression for every sharding strategy; shards are uneven, and some are empty."""

import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.distributed import local_tensor

STEPS, BATCH = 12, 12  # 12 rows: the same split for 1, 2, 3 and 4 ranks
STATES = ("exp_avg", "exp_avg_sq", "exp_dev_sq")
OPTIONS = {"lr": 1e-2}


def make_model(dtype=torch.float32, hidden=7):
    """Weights of 7, 2 and 1 rows: on 2 ranks the last layer of one rank is empty."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 2), nn.Tanh(), nn.Linear(2, 1))
    return nn.Sequential(*layers).to(dtype)


def two_groups(model):
    """Weights with decay, biases without: two groups, as trainers make them."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]


def batches(steps=STEPS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = [
        (torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 1, generator=generator))
        for _ in range(steps)
    ]
    return [(x.to(dtype), y.to(dtype)) for x, y in draw]


def share(rank, world_size):
    """This rank's rows of each batch."""
    size = BATCH // world_size
    return slice(rank * size, (rank + 1) * size)


def train(forward, optimizer, rows=slice(None), start=0, stop=STEPS, before_step=None):
    """Train on some rows of batches `start` to `stop`; `before_step(step)` may spoil gradients."""
    dtype = next(iter(optimizer.param_groups[0]["params"])).dtype
    for step, (x, y) in enumerate(batches(stop, dtype)):
        if step < start:
            continue
        nn.functional.mse_loss(forward(x[rows]), y[rows]).backward()
        if before_step is not None:
            before_step(step)
        optimizer.step()
        optimizer.zero_grad()


def run_alone(dtype=torch.float32, make=None, **options):
    """The same training in one process on whole batches."""
    model = make_model(dtype)
    optimizer = (make or gated_optimizer)(model, **options)
    train(model, optimizer)
    return snapshot(model, optimizer)


def gated_optimizer(model, **options):
    """With a third state, beside which stand those of the default."""
    return PopRiskAdamW(two_groups(model), **{**OPTIONS, "noise_source": "temporal", **options})


def whole(tensor):
    """The unsharded tensor, a copy; a collective for DTensors."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def snapshot(model, optimizer):
    """Weights and states by parameter name, unsharded, with the counts."""
    named = list(model.named_parameters())
    states = {name: optimizer.state[p] for name, p in named}
    return {
        "weights": {name: whole(p) for name, p in named},
        **{key: {name: whole(s[key]) for name, s in states.items() if key in s} for key in STATES},
        "step": [float(s["step"]) for s in states.values()],
        "dev_step": [float(s["dev_step"]) for s in states.values() if "dev_step" in s],
    }


def shard_with_fsdp2(model, mesh):
    """Shard each layer and the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def wrap_with_fsdp1(model, use_orig_params):
    """Flat parameters of each layer, seen by an optimizer whole or as pieces of the original."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )


def fsdp1_weights(model):
    """Copies of the whole weights by their own names; a collective."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model):
        named = model.module.named_parameters()
        return {n.replace("_fsdp_wrapped_module.", ""): whole(p) for n, p in named}


def local_sizes(model):
    return [local_tensor(p).numel() for p in model.parameters()]


def assert_same(actual, expected, rtol):
    """Weights and states to `rtol` of each tensor's largest entry; counts exactly."""
    assert actual["step"] == expected["step"]
    assert actual["dev_step"] == expected["dev_step"]
    for key in ("weights", *STATES):
        assert actual[key].keys() == expected[key].keys()
        for name, value in expected[key].items():
            error = (actual[key][name].double() - value.double()).abs().max()
            bound = rtol * max(float(value.abs().max()), 1e-12)
            assert float(error) <= bound, f"{key} of {name}: {float(error):.1e} > {bound:.1e}"
