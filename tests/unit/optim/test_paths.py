"""Which path steps a group, without stepping: an accelerator is stood in for by `meta`."""

import logging
import warnings

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _compiled, _paths
from tests.helpers.optim_problem import make_params, train
from tests.unit.optim import paths

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


def test_without_a_compiler_one_warning_and_the_eager_path(monkeypatch):
    monkeypatch.setattr(_compiled, "_failures", [])
    monkeypatch.setattr(_compiled.shutil, "which", lambda _: None)
    optimizer = PopRiskAdamW(make_params(), fused=True)
    with pytest.warns(UserWarning, match=r"none of the C\+\+ compilers"):
        assert optimizer.path == "single_tensor"
    assert optimizer.path == "single_tensor"  # no second warning: it would be an error
    assert not optimizer._step_supports_amp_scaling


def test_a_failing_compiler_loses_no_step(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no space left\non device")

    paths.uncompile(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(_paths, "compiler_is_found", lambda: not _compiled._failures)
    expected, _ = train(lambda p: PopRiskAdamW(p, fused=False), steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, optimizer = train(lambda p: PopRiskAdamW(p, fused=True), steps=3)
    assert [str(w.message) for w in caught if "fused=True" in str(w.message)] == [
        "PopRiskAdamW(fused=True) steps without compilation, which failed: no space left"
    ]
    assert optimizer.path == "single_tensor"
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("impl", ["fused_compiled"])
def test_a_compilation_is_announced_once_before_it_starts(impl, monkeypatch, caplog):
    """Half a minute on some machines; the next step and the next optimizer say nothing."""
    said = []

    def compile_(function, **_):
        said.extend(record.getMessage() for record in caplog.records)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    with caplog.at_level(logging.INFO, logger="poprisk_integrations"):
        for _ in range(2):
            param = torch.nn.Parameter(torch.ones(8))
            optimizer = PopRiskAdamW([param], fused=True)
            for _ in range(2):
                param.grad = torch.ones(8)
                optimizer.step()
    (message,) = said
    assert "compiles its fused step for float32 parameters" in message
    assert "fused=False" in message
    assert len(caplog.records) == 1
