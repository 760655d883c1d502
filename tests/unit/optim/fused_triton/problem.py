"""One problem for all tests of the interpreted kernel: shapes, gradients, comparison."""

import numpy as np
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _fused_triton as fused
from poprisk_integrations.optim._options import resolve_group

KERNEL = "poprisk_integrations.optim._triton_kernel"
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
# empty, 0-dim, single, odd, a block less one element, a block, several blocks
SHAPES = ((0, 4), (), (1,), (3,), (5, 7), (1023,), (1024,), (3, 700))


def fused_step(optimizer, keep=1.0, grad_scale=None, collect=False):
    """A step by the kernel; statistics added over the launches."""
    sums = [] if collect else None
    for index, group in enumerate(optimizer.param_groups):
        work = optimizer._gather(index, group)
        options = resolve_group(group)
        assert all(fused.triton_supports(work, i, options) for i in range(len(work.params)))
        scale = None if grad_scale is None else torch.tensor(float(grad_scale))
        with torch.no_grad(), np.errstate(invalid="ignore"):  # numpy reports 0/0
            fused.triton_poprisk_adamw(work, options, sums, torch.tensor(keep), scale)
    return torch.stack(sums).sum(0) if collect else None


def make(shapes=SHAPES, dtype=FP32, seed=0, cls=PopRiskAdamW, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    options = {"lr": 1e-2, "weight_decay": 0.1, "foreach": False, **options}
    for param in params:
        param.grad_dtype = None  # FSDP may reduce gradients in another dtype
    optimizer = cls(params, **options)
    optimizer.init_state()
    return optimizer


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer):
    """All tensors of an optimizer by name."""
    named = {}
    for i, param in enumerate(params_of(optimizer)):
        named[f"{i}.param"] = param.detach()
        named |= {f"{i}.{key}": value for key, value in optimizer.state[param].items()}
    return named


def copy(target, source):
    for a, b in zip(everything(target).values(), everything(source).values(), strict=True):
        a.copy_(b)


def set_grads(optimizer, step, dtype=FP32, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params_of(optimizer):
        grad = torch.randn(param.shape, generator=generator) + 0.3
        if grad.numel() > 2:
            grad.view(-1)[::3] = 0.0  # coordinates that never have a gradient
        param.grad = torch.empty_like(param, dtype=dtype).copy_(grad * scale)


def compare(optimizer, reference, share=0.0):
    """Equal up to float32 rounding; `share` of bfloat16 values may fall on the other neighbour."""
    # a mean near zero, a small deviation and an update just beyond the boundary are differences
    # of nearly equal numbers; gradients are about 1 here
    lr = float(reference.param_groups[0]["lr"])
    small = {"param": 2e-5 * lr, "exp_avg": 1e-7, "exp_dev_sq": 1e-8}
    ours, theirs = everything(optimizer), everything(reference)
    for name, expected in theirs.items():
        actual = ours[name]
        assert actual.dtype == expected.dtype
        is_low = expected.dtype == BF16
        if is_low:
            off = actual != expected
            assert float(off.float().sum()) <= share * expected.numel(), name
        torch.testing.assert_close(
            actual,
            expected,
            rtol=2**-7 if is_low else 1e-6,
            atol=small.get(name.partition(".")[2], 0.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(steps, grad_dtype=None, share=0.0, **options):
    """Each step of the kernel starts where the reference is, so that errors do not add up."""
    reference, optimizer = make(**options), make(**options)
    for step in range(steps):
        copy(optimizer, reference)
        for each in (optimizer, reference):
            set_grads(each, step, grad_dtype or options.get("dtype", FP32))
        reference.step()
        fused_step(optimizer)
        compare(optimizer, reference, share)
