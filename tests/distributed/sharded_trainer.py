"""Trainer under FSDP and DeepSpeed on the CPU, where accelerate itself shards nothing."""

import contextlib
import os
import sys
from unittest import mock

from accelerate.state import DistributedType, PartialState

from poprisk_integrations.distributed import is_dtensor


@contextlib.contextmanager
def gloo_is_an_accelerator(strategy):
    """Give ranks without an accelerator the gloo backend; all else is as a user runs it.

    PartialState._prepare_backend knows one for them only if cpu=True, and cpu=True switches FSDP
    and DeepSpeed off (AcceleratorState.__init__): FSDP is for MULTI_GPU and its like.
    """
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    if strategy.startswith("zero"):
        import deepspeed  # noqa: F401 - imports the next one

        # No compiler is asked for shared-memory collectives.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    is_fsdp = strategy.startswith("fsdp")
    kind = DistributedType.MULTI_GPU if is_fsdp else DistributedType.MULTI_CPU
    with mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", kind)):
        yield


def innermost(optimizer):
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def held(optimizer, key="exp_avg"):
    """Elements of a state that this rank holds."""
    tensors = [state[key] for state in innermost(optimizer).state.values()]
    return sum((t.to_local() if is_dtensor(t) else t).numel() for t in tensors)


def whole_weights(model):
    """Copies of the unsharded parameters by name; a collective."""
    return {n: whole(p) for n, p in getattr(model, "module", model).named_parameters()}


def whole(param):
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
    return (param.full_tensor() if is_dtensor(param) else param).detach().clone()
