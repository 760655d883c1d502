"""granularity="row" and "tensor": one gate for many coordinates."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _paths
from tests.helpers.optim_problem import feed, gradients, make_params, snapshot, unchanged
from tests.unit.optim.paths import FLAGS, TORCH


def trained(shapes, history, **options):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = PopRiskAdamW(params, lr=1e-2, collect_stats_every=1, **options)
    for row in history:
        feed(params, row)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("source", ["temporal", "moments"])
def test_a_row_is_a_tensor_of_its_own(impl, source):
    """Rows of a matrix move as tensors that hold one row each; explicit or calibrated alpha."""
    generator = torch.Generator().manual_seed(0)
    history = [torch.randn(4, 9, generator=generator) + 0.3 for _ in range(10)]
    options = {"noise_source": source, **FLAGS[impl]}
    (matrix,), rows = trained([(4, 9)], [[g] for g in history], granularity="row", **options)
    vectors, tensors = trained([(9,)] * 4, map(list, history), granularity="tensor", **options)
    torch.testing.assert_close(matrix.detach(), torch.stack(list(vectors)).detach())
    for name, value in tensors.gate_stats().items():
        torch.testing.assert_close(rows.gate_stats()[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", TORCH)
def test_coordinates_of_a_vector_are_its_rows(impl):
    generator = torch.Generator().manual_seed(0)
    history = [[torch.randn(50, generator=generator) + 0.3] for _ in range(10)]
    (by_row,), _ = trained([(50,)], history, granularity="row", **FLAGS[impl])
    (each,), _ = trained([(50,)], history, granularity="coordinate", **FLAGS[impl])
    torch.testing.assert_close(by_row, each)


@pytest.mark.parametrize("grain", ["row", "tensor"])
@pytest.mark.parametrize("impl", TORCH)
def test_one_gate_opens_or_closes_all_it_stands_for(impl, grain):
    """Two rows of pure noise and two with a signal in some coordinates only."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.zeros(4, 400)
    mean[:2, :100] = 1.0
    history = [[mean + torch.randn(4, 400, generator=generator)] for _ in range(150)]
    options = {"granularity": grain, "gate": "hard", "weight_decay": 0.0, "false_open_rate": 0.01}
    start = [[torch.zeros(4, 400)]]  # the first steps are ungated
    (param,), optimizer = trained([(4, 400)], start + history, **options, **FLAGS[impl])
    before = param.detach().clone()
    feed([param], history[0])
    optimizer.step()
    moved = (param != before).all(1) if grain == "row" else (param != before).all()
    assert moved.tolist() == ([True, True, False, False] if grain == "row" else True)
    still = (param == before).all(1)
    assert still.tolist() == ([False, False, True, True] if grain == "row" else [False] * 4)
    share = float(optimizer.gate_stats()["open_fraction"])
    assert share == (0.5 if grain == "row" else 1.0)


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("grain", ["row", "tensor"])
def test_rows_without_gradients_are_dead_and_counted(impl, grain):
    grads = [torch.zeros(3, 80), torch.zeros(3, 80)]
    for grad in grads:
        grad[0] = torch.randn(80, generator=torch.Generator().manual_seed(2)) + 1
    history = [[g] for g in grads * 3]
    _, optimizer = trained([(3, 80)], history, granularity=grain, **FLAGS[impl])
    stats = optimizer.gate_stats()
    assert float(stats["closed_zero_grad"]) == pytest.approx(2 / 3 if grain == "row" else 0)
    assert float(stats["open_fraction"]) == pytest.approx(1 / 3 if grain == "row" else 1)


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("grain", ["row", "tensor"])
def test_the_first_step_is_ungated_and_skips_leave_no_trace(impl, grain):
    options = {"lr": 1e-2, "granularity": grain, "alpha": 1e6, **FLAGS[impl]}
    params, twins = make_params(), make_params()
    optimizer = PopRiskAdamW(params, **options)
    reference = PopRiskAdamW(twins, lr=1e-2, gate="none", **FLAGS[impl])
    for row in gradients(1):
        for some, run in ((params, optimizer), (twins, reference)):
            feed(some, row)
            run.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-8)
    before = snapshot(optimizer)
    params[0].grad[1, 2] = torch.nan
    optimizer.step()
    assert unchanged(optimizer, before)


@pytest.mark.parametrize("grain", ["row", "tensor"])
def test_device_paths_read_nothing_back(grain):
    param = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    for source in ("temporal", "moments"):
        options = {"granularity": grain, "noise_source": source, "collect_stats_every": 1}
        optimizer = PopRiskAdamW([param], **options)
        assert optimizer.path == "capturable"
        for _ in range(2):
            param.grad = torch.empty_like(param)
            optimizer.step()  # .item(), bool() or float() of a meta tensor would raise


def test_a_fused_kernel_that_was_asked_for_is_missed_aloud():
    param = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = PopRiskAdamW([param], granularity="row", fused=True)
    _paths._warn_of_grain.cache_clear()
    with pytest.warns(UserWarning, match=r"granularity='row'\) steps without the fused kernel"):
        assert optimizer.path == "capturable"
    assert optimizer.path == "capturable"  # said once


WIDTHS = {"pairs": (800, 2), "rows": (400, 12), "long rows": (200, 80)}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("source", ["temporal", "moments"])
@pytest.mark.parametrize("unequal", [False, True])
def test_share_of_rows_of_pure_noise_that_pass(source, unequal, widths):
    """Within 10 % of 0.2 for independent coordinates, of equal variance or unequal.

    Sampling error: 3000 looks at rows and more, 3.6 % of 0.2.
    """
    shape = WIDTHS[widths]
    generator = torch.Generator().manual_seed(11)
    size = torch.randn(shape, generator=generator).mul(0.5).exp() if unequal else 1.0
    param = torch.nn.Parameter(torch.zeros(shape))
    betas = (0.8, 0.98)
    optimizer = PopRiskAdamW(
        [param], lr=0.0, betas=betas, rho=0.97, false_open_rate=0.2, granularity="row",
        noise_source=source, collect_stats_every=10, fused=False,
    )  # fmt: skip
    found = []
    for step in range(100 + 150):
        param.grad = size * torch.randn(shape, generator=generator)
        optimizer.step()
        if step >= 100 and step % 10 == 0:
            found.append(float(optimizer.gate_stats()["open_fraction"]))
    assert sum(found) / len(found) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize(
    ("make", "grain"),
    [
        (lambda: torch.zeros(6, requires_grad=True), "row"),  # as DeepSpeed's partitions are
        (lambda: marked("ds_id", 3), "tensor"),
        (lambda: marked("_fsdp_flattened", True), "row"),
    ],
)
def test_flattened_parameters_are_refused_by_name(make, grain):
    message = f"Invalid granularity: '{grain}'. Must be 'coordinate' for parameters without"
    with pytest.raises(ValueError, match=message):
        PopRiskAdamW([make()], granularity=grain)
    PopRiskAdamW([make()])
    # the wrapper may come after the optimizer
    optimizer = PopRiskAdamW([torch.nn.Parameter(torch.zeros(2, 3))], granularity=grain)
    param = make()
    param.grad = torch.ones_like(param)
    optimizer.param_groups[0]["params"] = [param]
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def marked(name, value):
    param = torch.nn.Parameter(torch.zeros(6))
    setattr(param, name, value)
    return param


def test_unknown_grains_are_refused():
    with pytest.raises(ValueError, match=r"Invalid granularity: 'col'\. Must be one of \('coord"):
        PopRiskAdamW(make_params(), granularity="col")
