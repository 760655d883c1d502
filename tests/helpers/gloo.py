"""Run a function in several gloo processes and collect what each returns."""

import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.leave import leave

# Imported once, in the server from which all processes are forked.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])


def _worker(rank, world_size, fn, args, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    # What torchrun sets, and frameworks look for.
    os.environ.update({name: str(rank) for name in ("RANK", "LOCAL_RANK")})
    os.environ.update({name: str(world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")})
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    # The environment is that of the fork server's start, so of whatever test ran then.
    os.environ.pop("PL_GLOBAL_SEED", None)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(fn(rank, world_size, *args), Path(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()
    leave()  # an exception has gone on to start_processes, which tells the test


def spawn_gloo(world_size, fn, *args):
    """Results of `fn(rank, world_size, *args)` by rank; `fn` must live in a module."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            mp.start_processes(
                _worker, (world_size, fn, args, folder), world_size, start_method="forkserver"
            )
        return [torch.load(Path(folder, f"rank{r}.pt")) for r in range(world_size)]
