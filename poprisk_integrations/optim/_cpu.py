"""The fused step on a CPU: one call of the C++ kernel for all tensors of a group and format."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._cpu_build import FIELDS, SETTINGS, load_kernel
from poprisk_integrations.optim._options import MOMENTS, GroupOptions
from poprisk_integrations.optim._rounding import first_index, rounding_key
from poprisk_integrations.optim._scalars import scalar_row
from poprisk_integrations.optim._work import GroupWork, memory_order

__all__ = ["all_finite", "cpu_poprisk_adamw"]

# as the kernel numbers them
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float64: 3}
BFLOAT16, CODES, FLOAT64 = 1, 2, 3
GATES = {"soft": 1, "snr": 1, "hard": 2}
PLAIN = {Tensor, torch.nn.Parameter}
# mapped over lists of thousands of tensors, where a loop would cost more than the step
_is_cpu = attrgetter("is_cpu")
_dtype, _address, _numel = attrgetter("dtype"), Tensor.data_ptr, Tensor.numel


def all_finite(works: Sequence[GroupWork]) -> bool | None:
    """Whether all gradients are finite, and so are the squares that states would hold.

    None where the kernel cannot look at one of them.
    """
    kernel, threads = load_kernel(), torch.get_num_threads()
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for work in works:
        grads = _readable_grads(work)
        if not grads and work.owners:
            return None
        for dtype in set(map(_dtype, grads)):
            by_dtype.setdefault(dtype, []).extend([g for g in grads if g.dtype == dtype])
    if kernel is None or not by_dtype.keys() <= FORMATS.keys():
        return None
    for dtype, alike in by_dtype.items():
        table = array("q", [*map(_address, alike), *map(_numel, alike)])
        place = table.buffer_info()[0]
        numels = place + table.itemsize * len(alike)
        if not kernel.poprisk_all_finite(place, numels, len(alike), FORMATS[dtype], threads):
            return False
    return True


def _as_plain(tensors: list[Tensor]) -> list[Tensor] | None:
    """Tensors whose memory may be read as it is, of DTensors the shards; None for other kinds."""
    if not PLAIN.issuperset(map(type, tensors)):
        tensors = [local_tensor(tensor) for tensor in tensors]
        if not PLAIN.issuperset(map(type, tensors)):
            return None
    return tensors


def _readable_grads(work: GroupWork) -> list[Tensor]:
    """All gradients, of DTensors the shards, if memory holds their elements in order; else none."""

    def look() -> list[Tensor]:
        grads = _as_plain(work.owners_grads)
        return grads if grads is not None and _are_readable(grads) else []

    return work.listed("readable", look)


def _are_readable(grads: list[Tensor]) -> bool:
    """Whether memory holds the elements one after the other, with their signs."""
    return (
        all(map(Tensor.is_contiguous, grads))
        and not any(map(Tensor.is_neg, grads))
        and all(map(_is_cpu, grads))
    )


@dataclass(slots=True)
class _Batch:
    """Tensors of the same formats, and the kernel's table of them, column by column."""

    work: GroupWork
    formats: tuple[int, ...]  # of parameter, gradient and moments
    columns: dict[str, Iterable[int]]
    copies: list[Tensor]  # that must live until the call is over


def cpu_poprisk_adamw(
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    grad_scale: Tensor | None = None,
) -> GroupWork:
    """Step of one group; arguments as in `step_group`.

    Returns the parameters that were left out untouched, for want of a usable layout or dtype.
    """
    batch = _simple_batch(work)
    batches, left = ([batch], work.only([])) if batch else _batches(work, options)
    for batch in batches:
        _step(batch, options, sums, grad_scale)
    return left


def _simple_batch(work: GroupWork) -> _Batch | None:
    """All tensors at once, where none needs to be looked at by itself."""
    if work.pooled or not work.owners:
        return None
    keys = MOMENTS if work.has_noise else MOMENTS[:2]
    try:
        others = [work.owners, *map(work.state_list, keys)]
    except KeyError:  # codes
        return None
    found = [_as_plain(tensors) or [] for tensors in others]
    found.insert(1, _readable_grads(work))
    dtypes = [set(map(_dtype, tensors)) for tensors in found]
    if dtypes[0] not in ({torch.float32}, {torch.float64}) or dtypes.count(dtypes[0]) < len(found):
        return None
    if not all(all(map(Tensor.is_contiguous, tensors)) for tensors in found):
        return None
    columns: dict[str, Iterable[int]] = {
        name: map(_address, tensors) for name, tensors in zip(FIELDS[:5], found, strict=False)
    }
    columns["numel"] = map(_numel, found[0])
    return _Batch(work, (FORMATS[found[0][0].dtype],) * len(found), columns, [])


def _batches(work: GroupWork, options: GroupOptions) -> tuple[list[_Batch], GroupWork]:
    """Tensors by their formats, one by one, and the work on those that the kernel cannot take."""
    chosen: dict[tuple[int, ...], dict[int, tuple[dict[str, int], list[Tensor]]]] = {}
    left = []
    for i in range(len(work.owners)):
        formats = _formats(work, i)
        row = None if formats is None else _row(work, i, formats, options)
        if formats is None or row is None:
            left.append(i)
        else:
            chosen.setdefault(formats, {})[i] = row
    batches = []
    for formats, rows in chosen.items():
        names = next(iter(rows.values()))[0]
        columns: dict[str, Iterable[int]] = {
            name: [row[name] for row, _ in rows.values()] for name in names
        }
        copies = [tensor for _, tensors in rows.values() for tensor in tensors]
        batches.append(_Batch(work.only(rows), formats, columns, copies))
    return batches, work.only(left)


def _formats(work: GroupWork, i: int) -> tuple[int, ...] | None:
    tensors = [work.params[i], work.grads[i], *(m.tensors[0] for m in work.moments(i))]
    formats = tuple(FORMATS.get(tensor.dtype, -1) for tensor in tensors)
    is_known = -1 not in formats and CODES not in formats[:2]
    is_one = set(formats) == {FLOAT64} or FLOAT64 not in formats
    return formats if is_known and is_one and _as_plain(tensors) is not None else None


def _row(
    work: GroupWork, i: int, formats: tuple[int, ...], options: GroupOptions
) -> tuple[dict[str, int], list[Tensor]] | None:
    """One tensor's entries of the table, and copies that they point to; None for a layout."""
    param, grad, moments = work.params[i], work.grads[i], work.moments(i)
    values = [moment.tensors[0] for moment in moments]
    is_contiguous = all(tensor.is_contiguous() for tensor in (param, *values))
    is_dense = all(t.stride() == param.stride() for t in values) and memory_order(param) is not None
    # rounding draws are numbered in row-major order, and rows are those of it
    by_order = _converts(formats) or work.pooled
    offset = first_index(work.owners[i]) if _converts(formats) else 0
    if offset is None or not (is_contiguous or (is_dense and not by_order)):
        return None
    copies = []
    if not is_contiguous or not _are_readable([grad]):
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        copies.append(grad)
    entries = dict(zip(FIELDS, map(_address, (param, grad, *values)), strict=False))
    entries |= {"numel": param.numel(), "offset": offset, "rows": 1}
    for moment, name in zip(moments, ("scale_avg", "scale_sq", "scale_dev"), strict=False):
        entries[name] = _address(moment.tensors[1]) if moment.kind == "8bit" else 0
    if CODES in formats:
        entries["rows"] = param.shape[0]
    if work.pooled:
        gate = work.pooled[i].gate.to(torch.float64, copy=True).contiguous()
        copies.append(gate)
        entries |= {"gate": _address(gate)}
        if gate.numel() > 1:
            entries["rows"] = gate.numel()
        elif CODES in formats and param.shape[0] > 1:  # a number for each row of codes
            copies.append(gate.expand(param.shape[0]).contiguous())
            entries |= {"gate": _address(copies[-1])}
    return entries, copies


def _converts(formats: tuple[int, ...]) -> bool:
    return BFLOAT16 in formats or CODES in formats


def _step(
    batch: _Batch,
    options: GroupOptions,
    sums: list[Tensor] | None,
    grad_scale: Tensor | None,
) -> None:
    work, formats, count = batch.work, batch.formats, len(batch.work.owners)
    # Step counts are few, most often one: so are the scalars.
    steps = list(map(Tensor.item, work.steps))
    seen = list(map(Tensor.item, work.dev_steps)) or [0.0] * count
    numbers: dict[tuple[float, float], int] = {}
    index = [numbers.setdefault(pair, len(numbers)) for pair in zip(steps, seen, strict=True)]
    factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    scalars = array("d")
    for step, deviations in numbers:
        scalars.extend(scalar_row(options, step + 1, deviations, factor))
    columns = {
        **batch.columns,
        "step": map(_address, work.steps),
        "dev_step": map(_address, work.dev_steps),
        "row_index": index,
    }
    if _converts(formats):
        after = torch.tensor(steps) + 1
        columns["key"] = rounding_key(
            after, torch.tensor(work.positions), options.rounding_seed
        ).tolist()
    table = array("q")
    for end, name in enumerate(FIELDS, start=1):
        table.extend(columns.get(name, ()))
        if len(table) < end * count:
            table.extend(array("q", [name == "rows"]) * count)
    settings = {
        "count": count,
        "threads": torch.get_num_threads(),
        "param_format": formats[0],
        "grad_format": formats[1],
        "avg_format": formats[2],
        "sq_format": formats[3],
        "dev_format": formats[-1],
        "converts": _converts(formats),
        "gate_kind": GATES.get(options.gate, 0) if options.gated and not work.pooled else 0,
        "shifts": options.gate == "soft",
        "measures": options.gated and work.has_noise,
        "gates_decay": options.gate_decay and options.gated,
        "maximizes": options.maximize,
        "rounds_param": options.stochastic_rounding,
        "collects": sums is not None,
    }
    given = array("q", [int(settings[name]) for name in SETTINGS])
    found = array("d", [0.0] * 5)
    kernel: Any = load_kernel()
    kernel.poprisk_step(*(numbers.buffer_info()[0] for numbers in (given, table, scalars, found)))
    _mark_changed(_as_plain(work.owners) or [])
    if sums is not None:
        sums.append(_row_of_sums(work, found.tolist(), float(options.lr)))


def _mark_changed(params: list[Tensor]) -> None:
    """The kernel is not seen by autograd, which must know that parameters have moved."""
    try:
        increment_version(params)
    except TypeError:  # earlier releases of torch take one at a time
        for param in params:
            increment_version(param)


def _row_of_sums(work: GroupWork, found: list[float], lr: float) -> Tensor:
    """The columns of the gate statistics."""
    numel = float(sum(map(_numel, work.params)))
    n_open, gate, ungated_sq, gated_sq, n_dead = found
    if work.pooled:
        n_open = n_dead = 0.0
        for param, shared in zip(work.params, work.pooled, strict=True):
            share = param.numel() / max(1, shared.gate.numel())  # coordinates to a gate
            n_open += float(shared.is_open.sum()) * share
            n_dead += float(shared.is_dead.sum()) * share
    columns = [numel, n_open, gate, ungated_sq, gated_sq, n_dead, numel - n_open - n_dead]
    return torch.tensor([*columns, numel * lr], dtype=torch.float64)
