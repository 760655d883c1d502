"""FSDP1 (flat parameters) against one process; whole and rank-local checkpoints."""

import copy
import warnings

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from tests.helpers.sharding_problem import (
    OPTIONS,
    STEPS,
    make_model,
    share,
    train,
    whole,
)

pytestmark = pytest.mark.distributed


def wrap(model, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        )


def weights(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model):
        return {n: whole(p) for n, p in model.module.named_parameters()}


def clean(names):
    return {n.replace("_fsdp_wrapped_module.", ""): v for n, v in names.items()}


def flat(rank, world_size, folder):
    """Train; load the state into a new run in the middle; go on with both."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

    runs, rows = {}, share(rank, world_size)
    for use_orig_params in (True, False):
        model = wrap(make_model(), use_orig_params)
        optimizer = PopRiskAdamW(model.parameters(), weight_decay=0.1, **OPTIONS)
        train(model, optimizer, rows, stop=8)
        middle = clean(weights(model))
        saved = Fsdp.optim_state_dict(model, optimizer)
        keys = sorted({k for state in saved["state"].values() for k in state})

        resumed = make_model()
        resumed.load_state_dict(middle)
        resumed = wrap(resumed, use_orig_params)
        second = PopRiskAdamW(resumed.parameters(), weight_decay=0.1, **OPTIONS)
        if use_orig_params:
            # On CPU, torch 2.13 gathers all states of a parameter into one buffer here and returns
            # the last one under each key (AdamW's too), so the rank's own state is loaded.
            second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            second.load_state_dict(Fsdp.optim_state_dict_to_load(resumed, second, saved))
        for run, optim in ((resumed, second), (model, optimizer)):
            train(run, optim, rows, start=8)
        runs[str(use_orig_params)] = {
            "weights": clean(weights(model)),
            "resumed": clean(weights(resumed)),
            "keys": keys,
            "dev_steps": [float(s["dev_step"]) for s in second.state.values()],
        }
    return runs


def one_bad_shard(rank, world_size, folder):
    """A NaN that only rank 0 sees: flat parameters are plain tensors."""
    runs = {}
    for use_orig_params in (True, False):
        model = wrap(make_model(), use_orig_params)
        optimizer = PopRiskAdamW(model.parameters(), **OPTIONS)

        def spoil(step, model=model):
            if step == 5 and rank == 0:
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                grads[0].view(-1)[0] = float("nan")

        train(model, optimizer, share(rank, world_size), before_step=spoil)
        runs[str(use_orig_params)] = {
            "skipped": optimizer.skipped_nonfinite,
            "steps": [float(s["step"]) for s in optimizer.state.values()],
            "weights": clean(weights(model)),
        }
    return runs


def other_world_size(rank, world_size, folder):
    """A rank-local state dict of 2 ranks does not fit the model on one."""
    runs = {}
    for use_orig_params in (True, False):
        model = wrap(make_model(), use_orig_params)
        optimizer = PopRiskAdamW(model.parameters(), **OPTIONS)
        train(model, optimizer, share(rank, world_size), stop=3)
        alone = make_model()
        if not use_orig_params:  # one flat parameter per layer, the children first
            layers = [layer for layer in alone if isinstance(layer, nn.Linear)]
            flats = [torch.cat([p.flatten() for p in layer.parameters()]) for layer in layers]
            alone = nn.ParameterList([nn.Parameter(f.detach()) for f in flats])
        second = PopRiskAdamW(alone.parameters(), **OPTIONS)
        before = [whole(p) for p in alone.parameters()]
        try:
            second.load_state_dict(optimizer.state_dict())
            outcome = "accepted"
        except ValueError as error:
            outcome = str(error)
        same = all(torch.equal(a, b) for a, b in zip(before, alone.parameters(), strict=True))
        runs[str(use_orig_params)] = {
            "outcome": outcome,
            "untouched": same and len(second.state) == 0,
        }
    return runs


JOBS = {2: [flat, one_bad_shard, other_world_size]}
USE_ORIG_PARAMS = pytest.mark.parametrize("use_orig_params", ["True", "False"])


@USE_ORIG_PARAMS
def test_equals_one_process_and_resumes(results, use_orig_params):
    model = make_model()
    optimizer = PopRiskAdamW(model.parameters(), weight_decay=0.1, **OPTIONS)
    train(model, optimizer)
    for rank in results(2, flat):
        run = rank[use_orig_params]
        assert run["keys"] == ["dev_step", "exp_avg", "exp_avg_sq", "exp_dev_sq", "step"]
        assert set(run["dev_steps"]) == {STEPS - 1.0}
        for key in ("weights", "resumed"):
            for name, value in model.named_parameters():
                torch.testing.assert_close(run[key][name], value.detach(), rtol=1e-6, atol=1e-7)


@USE_ORIG_PARAMS
def test_a_bad_gradient_on_one_rank_skips_the_step_on_that_rank(results, use_orig_params):
    """The documented limit: a flat shard is a plain tensor, which does not know its peers."""
    bad, other = (rank[use_orig_params] for rank in results(2, one_bad_shard))
    assert (bad["skipped"], other["skipped"]) == (1, 0)
    assert set(bad["steps"]) == {STEPS - 1.0}
    assert set(other["steps"]) == {float(STEPS)}
    for run in (bad, other):
        assert all(bool(w.isfinite().all()) for w in run["weights"].values())


@USE_ORIG_PARAMS
def test_a_rank_local_state_of_another_world_size_is_refused(results, use_orig_params):
    for rank in results(2, other_world_size):
        run = rank[use_orig_params]
        assert "Checkpoint does not fit" in run["outcome"]
        assert run["untouched"]
