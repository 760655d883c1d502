"""Which path steps a group, without stepping: an accelerator is stood in for by `meta`."""

import logging

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _fused_compiled, _paths


def path(device="meta", numel=8, **options):
    return PopRiskAdamW([torch.nn.Parameter(torch.zeros(numel, device=device))], **options).path


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setattr(_paths, "triton_is_usable", lambda device: device.type == "meta")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "fused_triton"),
        ({"fused": True}, "fused_triton"),
        ({"capturable": True}, "fused_triton"),
        # one launch for all tensors is what `foreach` asks for
        ({"foreach": True}, "fused_triton"),
        ({"foreach": True, "capturable": True}, "fused_triton"),
        ({"foreach": False}, "fused_triton"),
        ({"fused": False}, "capturable"),
        ({"foreach": True, "fused": False}, "capturable"),
        ({"preserve_norm": True}, "capturable"),
    ],
    ids=str,
)
def test_on_accelerators(options, expected):
    assert path(**options) == expected


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_on_accelerators_without_triton(options, monkeypatch):
    monkeypatch.setattr(_paths, "triton_is_usable", lambda device: False)
    assert path(**options) == "capturable"


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "single_tensor"),
        ({"foreach": True}, "foreach"),
        ({"foreach": True, "numel": _paths.AUTO_FUSED_NUMEL}, "foreach"),
        ({"numel": _paths.AUTO_FUSED_NUMEL}, "fused_compiled"),
        ({"foreach": False, "numel": _paths.AUTO_FUSED_NUMEL}, "fused_compiled"),
        ({"fused": True}, "fused_compiled"),
        ({"fused": False, "numel": _paths.AUTO_FUSED_NUMEL}, "single_tensor"),
        ({"capturable": True}, "capturable"),
    ],
    ids=str,
)
def test_on_the_cpu(options, expected, monkeypatch):
    monkeypatch.setattr(_paths, "compiler_is_found", lambda: True)
    assert path("cpu", **options) == expected


@pytest.mark.usefixtures("triton")
def test_each_group_has_its_own():
    params = [torch.nn.Parameter(torch.zeros(8, device=device)) for device in ("cpu", "meta")]
    groups = [{"params": [params[0]], "foreach": True}, {"params": [params[1]], "foreach": True}]
    assert PopRiskAdamW(groups).path == "foreach+fused_triton"


def test_a_compilation_is_announced_before_it_starts(monkeypatch, caplog):
    """Half a minute on some machines; the next step and the next optimizer say nothing."""
    said = []

    def compile_(function, **_):
        said.extend(record.getMessage() for record in caplog.records)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(_paths, "compiler_is_found", lambda: True)
    _fused_compiled._compiled.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="poprisk_integrations"):
            for _ in range(2):
                param = torch.nn.Parameter(torch.ones(8))
                optimizer = PopRiskAdamW([param], fused=True)
                for _ in range(2):
                    param.grad = torch.ones(8)
                    optimizer.step()
    finally:
        _fused_compiled._compiled.cache_clear()
    (message,) = said
    assert "compiles its fused step for float32 parameters" in message
    assert "fused=False" in message
    assert len(caplog.records) == 1
