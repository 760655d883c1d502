"""What a step needs beside parameters, gradients and states."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poprisk_integrations import PopRiskAdamW
from tests.unit.optim.torch_generic.optimizer_info import IMPLEMENTATIONS, needs_cuda

COUNT, SIZE = 12, 5000


class PeakBytes(TorchDispatchMode):
    """Largest sum of the storages that operators made and somebody still holds.

    Args:
        known: Tensors that were there before, and do not count.
    """

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_of_a_step(impl, **kwargs):
    params = [torch.nn.Parameter(torch.ones(SIZE)) for _ in range(COUNT)]
    optimizer = PopRiskAdamW(params, **IMPLEMENTATIONS[impl], **kwargs)
    for _ in range(2):  # the second step is the first that is gated
        for param in params:
            param.grad = torch.ones(SIZE)
        known = [*params, *(p.grad for p in params)]
        for param in params:
            known.extend(optimizer.state[param].values())
        with PeakBytes(known) as memory:
            optimizer.step()
    return memory.peak / (4 * SIZE), params


@pytest.mark.parametrize("kwargs", [{}, {"preserve_norm": True}, {"gate": "snr"}], ids=str)
@pytest.mark.parametrize("impl", ["single_tensor", "capturable"])
def test_one_tensor_at_a_time_needs_few_tensors(impl, kwargs):
    """Temporaries of one tensor, however many there are."""
    tensors, _ = peak_of_a_step(impl, **kwargs)
    assert 2 <= tensors < 12


@pytest.mark.parametrize("kwargs", [{}, {"preserve_norm": True}, {"gate": "snr"}], ids=str)
def test_foreach_temporaries_are_bounded_by_the_chunk_and_not_by_the_model(monkeypatch, kwargs):
    """A whole copy of the model per operator is what large models cannot pay."""
    from poprisk_integrations.optim import _work

    whole, together = peak_of_a_step("foreach", **kwargs)
    assert whole > 2 * COUNT  # the measure sees the copies of an unbounded call
    monkeypatch.setattr(_work, "CHUNK_NUMEL", 2 * SIZE)
    bounded, in_chunks = peak_of_a_step("foreach", **kwargs)
    assert bounded < 12 * 2
    assert all(torch.equal(a, b) for a, b in zip(together, in_chunks, strict=True))


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["capturable", "fused"])
def test_peak_on_cuda(impl):
    from tests.unit.optim.torch_generic.optimizer_info import flags

    params = [torch.nn.Parameter(torch.ones(1 << 20, device="cuda")) for _ in range(COUNT)]
    optimizer = PopRiskAdamW(params, **flags(impl, "cuda"))
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 4 * (1 << 20) * 16  # bytes of a few tensors, not of 24
