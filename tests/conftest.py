"""Seeds, offline mode and leak checks for every test."""

import os
import random

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Before any Hugging Face import: nothing may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_leaks():
    """A test must leave the environment and the process group as it found them."""
    before = dict(os.environ)
    yield
    changed = {
        name
        for name in before.keys() | os.environ.keys()
        if before.get(name) != os.environ.get(name) and name not in _HARMLESS
    }
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    # What seed_everything leaves decides who sits out, so the next test must not see it.
    changed -= {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}
    assert not changed, f"the test changed environment variables: {sorted(changed)}"
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())


# Set by pytest itself, or by an import that runs once per process.
_HARMLESS = {
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "ACCELERATE_MIXED_PRECISION",
    "LOCAL_RANK",
    "LT_NODE_RANK",
    "CUBLAS_WORKSPACE_CONFIG",
    "MPLCONFIGDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
}
