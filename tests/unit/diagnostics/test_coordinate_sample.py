import pytest
import torch

from poprisk_integrations.diagnostics.window_layout import (
    LARGEST_WHOLE,
    SAMPLED_COORDINATES,
    CoordinateSample,
    sample_coordinates,
    sampled_count,
)


def lowbias32(x):
    """The published hash in Python integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.parametrize(("numel", "count", "position"), [(1000, 64, 0), (77, 76, 5), (9, 1, 2)])
def test_equals_twin(numel, count, position):
    expected = []
    for i in range(count):
        start, end = i * numel // count, (i + 1) * numel // count
        draw = lowbias32(i ^ lowbias32(position)) & 0x7FFFFFFF
        expected.append(start + draw % (end - start))
    assert sample_coordinates(numel, count, position).tolist() == expected


@pytest.mark.parametrize("numel", [32_769, 70_001, 1_000_000, 2**31 + 11])
def test_one_coordinate_of_each_stratum(numel):
    index = sample_coordinates(numel, SAMPLED_COORDINATES, 3)
    assert index.dtype == (torch.int32 if numel < 2**31 else torch.int64)
    index = index.long()
    assert int(index[0]) >= 0
    assert int(index[-1]) < numel
    assert (index.diff() > 0).all()
    stratum = torch.arange(SAMPLED_COORDINATES + 1) * numel // SAMPLED_COORDINATES
    assert (index >= stratum[:-1]).all()
    assert (index < stratum[1:]).all()


def test_coordinates_are_spread_over_rows_and_columns():
    """4.2 million in rows of 1024: no column or row block gets more than its share."""
    index = sample_coordinates(2**22, SAMPLED_COORDINATES, 0).long()
    columns = torch.bincount(index % 1024, minlength=1024).double()
    assert float(columns.mean()) == 16
    assert float(columns.var()) == pytest.approx(16, rel=0.2)  # as of independent draws
    assert torch.equal(torch.bincount(index // 2**16), torch.full((64,), 256))


def test_no_random_state_is_touched_and_positions_differ():
    before = torch.get_rng_state()
    first, second = (sample_coordinates(10**6, 1000, position) for position in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert float((first == second).float().mean()) < 0.01
    assert torch.equal(first, sample_coordinates(10**6, 1000, 0))


@pytest.mark.parametrize("shards", [[100_000], [50_000] * 2, [70_000, 30_000, 0], [30] * 3_000])
def test_shards_of_a_large_tensor_share_the_number(shards):
    assert [sampled_count(n, LARGEST_WHOLE) for n in (32_000, 768, 0)] == [32_000, 768, 0]
    counts = [sampled_count(shard, sum(shards)) for shard in shards]
    assert SAMPLED_COORDINATES - len(shards) < sum(counts) <= SAMPLED_COORDINATES
    assert all(count <= shard for count, shard in zip(counts, shards, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_read(dtype):
    tensors = [
        torch.randn(3, 5).t(),
        torch.randn(300, 400).t(),
        torch.randn(()),
        torch.empty(0),
        torch.randn(70_000),
    ]
    tensors = [t.to(dtype) for t in tensors]
    sample = CoordinateSample(tensors, [t.numel() for t in tensors])
    assert sample.counts == [15, SAMPLED_COORDINATES, 1, 0, SAMPLED_COORDINATES]
    out = sample.zeros()
    sample.read(tensors, out)
    for position, (tensor, part) in enumerate(zip(tensors, out.parts, strict=True)):
        index = sample_coordinates(tensor.numel(), part.numel(), position)
        flat = tensor.reshape(-1).float()
        assert torch.equal(part, flat if index is None else flat[index.long()])
    sample.read([None, *tensors[1:4], None], out)
    assert not out.parts[0].any()
    assert not out.parts[4].any()
    assert out.parts[1].any()
