"""Gradients that are not plain fp32 tensors: the window reads them as the fp32 ones they equal."""

import pytest
import torch

from poprisk_integrations.diagnostics import GradientWindow

STEPS, ROWS, COLUMNS = 6, 5, 3


def gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, COLUMNS, 2, generator=generator) + 0.3 for _ in range(STEPS)]


def closed(make_param, make_grad, accumulator):
    param = torch.nn.Parameter(make_param(torch.ones(ROWS, COLUMNS, 2)))
    window = GradientWindow(STEPS, accumulator=accumulator)
    for grad in gradients():
        param.grad = make_grad(grad)
        window.add([param])
        with torch.no_grad():
            param.sub_(0.1 * param.grad)
    return window.close()


def to_complex(x):
    return torch.view_as_complex(x.contiguous())


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize(
    ("make_param", "make_grad"),
    [
        (torch.Tensor.double, torch.Tensor.double),
        (torch.clone, lambda grad: grad.to_sparse(1)),
        (to_complex, to_complex),
        (lambda x: to_complex(x.double()), lambda grad: to_complex(grad.double())),
    ],
    ids=["float64", "sparse", "complex64", "complex128"],
)
def test_reads_what_is_not_fp32(make_param, make_grad, accumulator):
    plain = closed(torch.clone, torch.clone, accumulator)
    other = closed(make_param, make_grad, accumulator)
    for name in ("ratio", "ratio_se", "risk_decrease", "agreement"):
        assert getattr(other, name) == pytest.approx(getattr(plain, name), rel=1e-4)
