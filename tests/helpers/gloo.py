"""Run a function in several gloo processes and collect what each returns."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank, world_size, fn, args, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(fn(rank, world_size, *args), Path(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()


def spawn_gloo(world_size, fn, *args):
    """Results of `fn(rank, world_size, *args)` by rank; `fn` must live in a module."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            mp.spawn(_worker, (world_size, fn, args, folder), nprocs=world_size)
        return [torch.load(Path(folder, f"rank{r}.pt")) for r in range(world_size)]
