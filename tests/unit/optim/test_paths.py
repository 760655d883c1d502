"""Which path steps a group, without stepping: an accelerator is stood in for by `meta`."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _paths

LARGE = _paths.AUTO_FUSED_NUMEL
# (device, options, with a compiler and Triton, without)
CHOICES = [
    ("meta", {}, "fused_triton", "capturable"),
    ("meta", {"fused": True}, "fused_triton", "capturable"),
    ("meta", {"capturable": True}, "fused_triton", "capturable"),
    # one launch for all tensors is what `foreach` asks for
    ("meta", {"foreach": True}, "fused_triton", "capturable"),
    ("meta", {"foreach": False}, "fused_triton", "capturable"),
    ("meta", {"fused": False}, "capturable", "capturable"),
    ("meta", {"foreach": True, "fused": False}, "capturable", "capturable"),
    ("meta", {"preserve_norm": True}, "capturable", "capturable"),
    ("cpu", {}, "single_tensor", "single_tensor"),
    ("cpu", {"foreach": True}, "foreach", "foreach"),
    ("cpu", {"foreach": True, "numel": LARGE}, "foreach", "foreach"),
    ("cpu", {"numel": LARGE}, "fused_compiled", "single_tensor"),
    ("cpu", {"foreach": False, "numel": LARGE}, "fused_compiled", "single_tensor"),
    ("cpu", {"fused": True}, "fused_compiled", None),
    ("cpu", {"fused": False, "numel": LARGE}, "single_tensor", "single_tensor"),
    ("cpu", {"preserve_norm": True, "numel": LARGE}, "single_tensor", "single_tensor"),
    ("cpu", {"capturable": True}, "capturable", "capturable"),
]


def path(device, numel=8, **options):
    return PopRiskAdamW([torch.nn.Parameter(torch.zeros(numel, device=device))], **options).path


@pytest.mark.parametrize(("device", "options", "best", "other"), CHOICES, ids=str)
def test_the_fastest_that_works(device, options, best, other, monkeypatch):
    monkeypatch.setattr(_paths, "triton_is_usable", lambda device: device.type == "meta")
    monkeypatch.setattr(_paths, "compiler_is_found", lambda: True)
    assert path(device, **options) == best
    monkeypatch.setattr(_paths, "triton_is_usable", lambda device: False)
    monkeypatch.setattr(_paths, "compiler_is_found", lambda: False)
    if other is not None:
        assert path(device, **options) == other


def test_each_group_has_its_own(monkeypatch):
    monkeypatch.setattr(_paths, "triton_is_usable", lambda device: True)
    params = [torch.nn.Parameter(torch.zeros(8, device=device)) for device in ("cpu", "meta")]
    groups = [{"params": [params[0]], "foreach": True}, {"params": [params[1]], "foreach": True}]
    assert PopRiskAdamW(groups).path == "foreach+fused_triton"
