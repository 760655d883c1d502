"""The stop under FSDP1, whose shards are plain tensors: two processes measure what one does."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from tests.helpers.sharding_problem import BATCH, batches, make_model, share
from tests.helpers.trainer_events import EventSequence

pytestmark = pytest.mark.distributed
STEPS, WINDOW, LIMIT = 24, 6, 0.05
KINDS = ("original parameters", "flat parameters")


def arguments(world_size, folder):
    """What the callback asks of TrainingArguments, which cannot be built in a bare gloo process."""
    return SimpleNamespace(
        device="cpu",
        world_size=world_size,
        train_batch_size=BATCH // world_size,
        n_gpu=0,
        gradient_accumulation_steps=1,
        max_grad_norm=LIMIT,
        fsdp="full_shard",
        output_dir=folder,
        logging_strategy="steps",
        save_strategy="no",
        eval_strategy="no",
    )


def run(model, rows, clip, args):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    callback = PopRiskEarlyStoppingCallback(window=WINDOW, epoch_steps=8, action="monitor")
    events = EventSequence(callback, optimizer, args, model=model)
    for x, y in batches(STEPS):
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        callback.grad_norm(clip(LIMIT))
        events.step()
        optimizer.zero_grad()
    return callback.progress.history, callback.stopping_state


def alone(folder):
    model = make_model()
    clip = lambda limit: nn.utils.clip_grad_norm_(model.parameters(), limit)  # noqa: E731
    return run(model, slice(0, BATCH), clip, arguments(1, folder))


def sharded(rank, world_size, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    found = {}
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(
                make_model(),
                device_id=torch.device("cpu"),
                use_orig_params=kind == "original parameters",
                auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
            )
            args = arguments(world_size, folder)
            found[kind] = run(model, share(rank, world_size), model.clip_grad_norm_, args)
    return found


JOBS = {2: [sharded]}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(results, tmp_path, kind):
    history, state = alone(tmp_path)
    ranks = [found[kind] for found in results(2, sharded)]
    assert ranks[0] == ranks[1]
    mine, mine_state = ranks[0]
    assert len(history) == STEPS // WINDOW
    for key in ("onset_step", "stop_step", "windows", "armed"):
        assert mine_state[key] == state[key]
    # Flat parameters join tensors into one column, which weights of standard errors go by.
    keys = ("signal_ratio", "noise", "risk_decrease", "lr_sum")
    keys = history[0].keys() if kind == "original parameters" else keys
    for ours, theirs in zip(mine, history, strict=True):
        for key in keys:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-9), key
