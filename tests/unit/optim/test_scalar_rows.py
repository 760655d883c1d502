"""Rows from the host and from the device hold the same numbers."""

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim._options import resolve_group
from poprisk_integrations.optim._scalar_rows import COLUMNS, device_rows, host_rows


@pytest.mark.parametrize("make", [PopRiskAdamW, PopRiskAdamW.paper])
@pytest.mark.parametrize(
    "kw", [{}, {"gate_warmup": 3}, {"gate": "snr", "gate_blend": 0.7}], ids=str
)
def test_host_and_device_agree(make, kw):
    optimizer = make([torch.nn.Parameter(torch.zeros(1))], lr=3e-4, weight_decay=0.1, **kw)
    options = resolve_group(optimizer.param_groups[0])
    steps, dev_steps = ([torch.tensor(0.0), torch.tensor(0.0)] for _ in range(2))
    for t in range(1, 12):
        before = [d.item() for d in dev_steps]
        expected, _ = host_rows(options, [t, t], before, torch.float32)
        rows, counts = device_rows(options, steps, dev_steps, torch.tensor(1.0), None)
        torch.testing.assert_close(rows, expected, rtol=1e-6, atol=0)
        assert counts.tolist() == [t, t]


def test_a_skipped_step_leaves_no_trace_and_a_scaled_gradient_is_unscaled():
    optimizer = PopRiskAdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    options = resolve_group(optimizer.param_groups[0])
    steps, dev_steps = [torch.tensor(4.0)], [torch.tensor(3.0)]
    rows, _ = device_rows(options, steps, dev_steps, torch.tensor(0.0), torch.tensor(1024.0))
    row = dict(zip(COLUMNS, rows[0].tolist(), strict=True))
    neutral = {"keep": 0, "dev_decay": 1, "dev_weight": 0, "mean_weight": 0, "sq_decay": 1}
    neutral |= {"sq_weight": 0, "step_size": 0, "weight_decay": 0, "param_scale": 1}
    assert {name: row[name] for name in neutral} == neutral
    assert row["grad_factor"] == 1 / 1024
    assert (steps[0].item(), dev_steps[0].item()) == (4.0, 3.0)
