"""DeepSpeed ZeRO 1, 2 and 3: training, checkpoints of the same and of another world size."""

import contextlib
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.sharding_problem import (
    BATCH,
    STEPS,
    batches,
    gated_optimizer,
    make_model,
    share,
    train,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed (it is in the test extra)",
    ),
]

MIDDLE = 8
STAGES = (1, 2, 3)
NOISE = {"exp_dev_sq", "dev_step"}


def make_engine(stage, load_universal=False):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # No compiler is asked for shared-memory collectives.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    model = make_model()
    optimizer = gated_optimizer(model)
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,  # not DeepSpeed's default of 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": load_universal},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def train_engine(engine, rows, start=0, stop=STEPS):
    for x, y in batches(stop)[start:]:
        engine.backward(nn.functional.mse_loss(engine(x[rows]), y[rows]))
        engine.step()


def summary(engine):
    """Whole weights and this rank's counts."""
    import deepspeed

    weights = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            weights[name] = param.detach().clone()
    states = list(client_optimizer(engine).state.values())
    return {
        "weights": weights,
        "keys": sorted(states[0]),
        "steps": [float(s["step"]) for s in states],
        "dev_steps": [float(s["dev_step"]) for s in states if "dev_step" in s],
        "noise": [float(s["exp_dev_sq"].sum()) for s in states if "exp_dev_sq" in s],
    }


def client_optimizer(engine):
    return engine.optimizer.optimizer


@contextlib.contextmanager
def without_noise(optimizer):
    """Hide the two states that ds_to_universal neither needs nor can read."""
    hidden = {p: {k: s.pop(k) for k in NOISE} for p, s in optimizer.state.items()}
    try:
        yield
    finally:
        for param, states in hidden.items():
            optimizer.state[param].update(states)


def convert(folder, tag, output):
    """A universal checkpoint; the text of the error if that fails."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = SimpleNamespace(
        input_folder=f"{folder}/{tag}",
        output_folder=f"{folder}/{output}",
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        main(options)
    except RuntimeError as error:
        return str(error)
    return "converted"


def save_and_resume(rank, world_size, folder):
    """Save in the middle, resume in a new engine, convert to a universal checkpoint."""
    runs, rows = {}, share(rank, world_size)
    for stage in STAGES:
        path = f"{folder}/stage{stage}"
        first = make_engine(stage)
        train_engine(first, rows, stop=MIDDLE)
        first.save_checkpoint(path, tag="middle")
        with without_noise(client_optimizer(first)):
            first.save_checkpoint(path, tag="plain")
        train_engine(first, rows, start=MIDDLE)

        second = make_engine(stage)
        second.load_checkpoint(path, tag="middle")
        loaded = summary(second)
        train_engine(second, rows, start=MIDDLE)
        outcomes = {}
        if rank == 0:
            outcomes["middle"] = convert(path, "middle", "universal_middle")
            outcomes["plain"] = convert(path, "plain", "universal")
        torch.distributed.barrier()
        runs[stage] = {
            "conversion": outcomes,
            "uninterrupted": summary(first),
            "loaded": loaded,
            "resumed": summary(second),
        }
    return runs


def load_universal(rank, world_size, folder):
    runs, rows = {}, share(rank, world_size)
    for stage in STAGES:
        engine = make_engine(stage, load_universal=True)
        engine.load_checkpoint(f"{folder}/stage{stage}", tag="universal")
        loaded = summary(engine)
        train_engine(engine, rows, start=MIDDLE)
        runs[stage] = {"loaded": loaded, "resumed": summary(engine)}
    return runs


def load_plain(rank, world_size, folder):
    outcomes = {}
    for stage in STAGES:
        engine = make_engine(stage)
        try:
            engine.load_checkpoint(f"{folder}/stage{stage}", tag="middle")
            outcomes[stage] = "accepted"
        except Exception as error:
            outcomes[stage] = f"{type(error).__name__}: {error}"
    return outcomes


def one_bad_shard(rank, world_size, folder):
    """Not a number in the gradients of rank 0's partition only."""
    engine = make_engine(1)
    optimizer, rows = client_optimizer(engine), share(rank, world_size)

    def spoil(optimizer, args, kwargs):
        if rank == 0:
            optimizer.param_groups[0]["params"][0].grad[0] = float("nan")

    train_engine(engine, rows, stop=5)
    hook = optimizer.register_step_pre_hook(spoil)
    train_engine(engine, rows, start=5, stop=6)
    hook.remove()
    train_engine(engine, rows, start=6)
    return {"skipped": optimizer.skipped_nonfinite, **summary(engine)}


# One rank alone loads what two have saved.
JOBS = {2: [save_and_resume, load_universal, one_bad_shard], 1: [load_universal, load_plain]}


@pytest.fixture(autouse=True)
def _saved(results):
    results(2, save_and_resume)


def assert_weights(actual, expected):
    for name, param in expected.named_parameters():
        torch.testing.assert_close(actual[name], param.detach(), rtol=1e-6, atol=1e-7)


def without_noise_alone(bias_decay):
    """One process whose noise is forgotten in the middle, as a universal checkpoint does."""
    model = make_model()
    optimizer = gated_optimizer(model)
    train(model, optimizer, stop=MIDDLE)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key in NOISE:
            del state[key]
    second = gated_optimizer(model)
    second.load_state_dict(saved)
    second.param_groups[1]["weight_decay"] = bias_decay
    train(model, second, start=MIDDLE)
    return model


STAGE = pytest.mark.parametrize("stage", STAGES)


@STAGE
def test_equals_one_process_and_resumes_bitwise(results, stage):
    model = make_model()
    train(model, gated_optimizer(model))
    for rank in results(2, save_and_resume):
        run = rank[stage]
        assert run["loaded"]["steps"] == [MIDDLE] * 2
        assert run["loaded"]["dev_steps"] == [MIDDLE - 1] * 2
        assert run["resumed"]["steps"] == [STEPS] * 2
        assert_weights(run["uninterrupted"]["weights"], model)
        for key in ("steps", "dev_steps", "noise"):
            assert run["resumed"][key] == run["uninterrupted"][key]
        for name, value in run["uninterrupted"]["weights"].items():
            assert torch.equal(run["resumed"]["weights"][name], value)


@STAGE
def test_a_checkpoint_of_another_world_size_is_refused(results, stage):
    (rank,) = results(1, load_plain)
    assert "DP world size of 2 but the current world size is 1" in rank[stage]


@STAGE
@pytest.mark.parametrize("world_size", [1, 2])
def test_universal_checkpoint_starts_the_noise_anew(results, stage, world_size):
    """It has no noise and no count of it: both start at zero, and the step goes on."""
    # For stage 3, DeepSpeed restores the options of the first group into all groups.
    expected = without_noise_alone(bias_decay=0.1 if stage == 3 else 0.0)
    for rank in results(world_size, load_universal):
        run = rank[stage]
        assert run["loaded"]["keys"] == ["exp_avg", "exp_avg_sq", "step"]
        assert run["loaded"]["steps"] == [MIDDLE] * 2
        assert run["resumed"]["steps"] == [STEPS] * 2  # two groups do not share a count
        assert run["resumed"]["dev_steps"] == [STEPS - MIDDLE] * 2
        assert_weights(run["resumed"]["weights"], expected)


@STAGE
def test_universal_conversion_needs_the_noise_hidden_below_stage_3(results, stage):
    """DeepSpeed 0.19 narrows each padded state but "step", and a 0-dim count cannot be."""
    outcomes = results(2, save_and_resume)[0][stage]["conversion"]
    assert outcomes["plain"] == "converted"
    reason = "converted" if stage == 3 else "narrow() cannot be applied to a 0-dim tensor."
    assert outcomes["middle"] == reason


def test_a_bad_gradient_in_one_partition_skips_the_step_on_that_rank(results):
    """The documented limit: a partition is a plain tensor, which does not know its peers."""
    bad, other = results(2, one_bad_shard)
    assert (bad["skipped"], other["skipped"]) == (2, 0)  # DeepSpeed steps group by group
    assert (bad["steps"], other["steps"]) == ([STEPS - 1] * 2, [STEPS] * 2)
    assert all(bool(w.isfinite().all()) for w in bad["weights"].values())
