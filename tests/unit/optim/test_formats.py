"""bfloat16 parameters, states in bfloat16 and in 8-bit codes: rounding, bias, bytes, conversion."""

import io

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import ema_mean_variance
from poprisk_integrations.optim._rounding import (
    global_index,
    hash32,
    rounding_key,
    to_bfloat16,
    uniform16,
)
from poprisk_integrations.optim._states import BLOCK, decode_blocks, encode_blocks
from tests.helpers.optim_problem import temporal
from tests.unit.optim.paths import FLAGS, TORCH, needs_cuda

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_dev_sq")
LOW = ("bfloat16", "8bit")
SHAPES = ((64, 100), (70, 64, 3, 3), (5000,), (40, 90), (5000, 8))
BF16 = torch.bfloat16


def rounded(source, step=1, position=0):
    key = rounding_key(torch.tensor(float(step)), position, 0)
    return to_bfloat16(source, uniform16(global_index(source, source), key, "param"))


def test_rounding_is_unbiased_to_neighbours_and_leaves_exact_values():
    source = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # 30 % of the way to the next bfloat16
    up = float((rounded(source) > 1.0).float().mean())
    assert up == pytest.approx(0.3, abs=0.005)
    assert float(rounded(source).double().mean()) == pytest.approx(float(source[0]), rel=1e-4)
    source = torch.randn(10_000)
    assert bool(((rounded(source).float() - source).abs() <= source.abs() * 2**-7).all())
    exact = source.bfloat16().float()
    assert torch.equal(rounded(exact).float(), exact)


def test_draws_depend_on_step_position_and_element_but_on_nothing_else():
    source = torch.full((4096,), 1.0 + 0.5 * 2**-7)
    base = rounded(source)
    torch.manual_seed(1234)  # no generator's state matters
    assert torch.equal(base, rounded(source))
    for other in (rounded(source, step=2), rounded(source, position=1)):
        assert float((base == other).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((base[1:] == base[:-1]).float().mean()) == pytest.approx(0.5, abs=0.05)


def lowbias32(x):
    """The published hash in Python integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def test_the_hash_is_the_published_one():
    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    words = hash32(torch.tensor(values).to(torch.int32))
    assert [word % 2**32 for word in words.tolist()] == [lowbias32(v) for v in values]


@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**32 - 3, 2**33 + 2**31 - 3], ids=str)
def test_draws_beyond_32_bits_of_elements(start):
    """An element's number is taken modulo 2^32, without sign and without overflow."""
    numbers = [start + i for i in range(6)]
    index = torch.tensor(numbers, dtype=torch.int64).to(torch.int32)
    key = rounding_key(torch.tensor(7.0), position=2, seed=0)
    draw = uniform16(index, key, "param")
    word = int(key) % 2**32
    assert draw.tolist() == [lowbias32((n % 2**32) ^ word) & 0xFFFF for n in numbers]
    ups = [1.0 + 2**-7 if d >= 0x8000 else 1.0 for d in draw.tolist()]
    assert to_bfloat16(torch.full((6,), 1.0 + 0.5 * 2**-7), draw).tolist() == ups


def test_nan_stays_nan():
    """Also the pattern of all ones, which the sum would carry over to zero."""
    source = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert to_bfloat16(source, torch.full((3,), 65535, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("impl", TORCH)
def test_small_updates_and_small_decay_survive(impl):
    """Both are below half an ulp of bfloat16: nearest rounding would lose them all."""

    def final(grad, weight_decay, **kwargs):
        param = torch.nn.Parameter(torch.full((5000,), 1.5, dtype=BF16))
        options = {"lr": 1e-4, "gate": "none", "weight_decay": weight_decay, **kwargs}
        optimizer = PopRiskAdamW([param], **options, **FLAGS[impl])
        for _ in range(60):
            param.grad = torch.full_like(param, grad)
            optimizer.step()
        return float(param.detach().double().mean())

    assert final(1.0, 0.0) == pytest.approx(1.5 - 60 * 1e-4, abs=5e-4)
    assert final(0.0, 1.0) == pytest.approx(1.5 * (1 - 1e-4) ** 60, abs=5e-4)
    assert final(1.0, 1.0, stochastic_rounding=False) == 1.5


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("fused", [None, False])
def test_more_than_2_to_the_31_elements(device, fused):
    """The last elements of a huge tensor are stepped as the first."""
    if torch.cuda.mem_get_info()[0] < 120e9:
        pytest.skip("needs 120 GB of free device memory")
    param = torch.nn.Parameter(torch.ones(2**31 + 16, dtype=BF16, device=device))
    options = {"lr": 0.5, "stochastic_rounding": False, "state_dtype": "bfloat16"}
    optimizer = PopRiskAdamW([param], fused=fused, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param[:4].tolist() == param[-4:].tolist()
    assert param[0].item() < 0.6


def make(dtype=torch.float32, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    return params, temporal(params, lr=1e-2, **options)


def run(params, optimizer, steps, start=0):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + t)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) + 0.2).to(p.dtype)
        optimizer.step()


def copied(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("state_dtype", [None, *LOW, {"exp_dev_sq": "bfloat16"}], ids=str)
def test_formats_follow_the_option_and_codes_the_shape(dtype, state_dtype):
    params, optimizer = make(dtype, state_dtype=state_dtype)
    optimizer.init_state()
    wanted = state_dtype if isinstance(state_dtype, dict) else dict.fromkeys(MOMENTS, state_dtype)
    for i, p in enumerate(params):
        for key in MOMENTS:
            # a vector, a small matrix and short rows stay float32
            if wanted.get(key) == "8bit" and i < 2:
                assert optimizer.state[p][f"{key}_codes"].dtype == torch.uint8
                assert optimizer.state[p][f"{key}_codes"].shape == p.shape
                assert optimizer.state[p][f"{key}_scale"].shape == ((64, 2), (70, 9))[i]
            else:
                expected = BF16 if wanted.get(key) == "bfloat16" else torch.float32
                assert optimizer.state[p][key].dtype == expected


def test_bytes_of_state_per_parameter():
    """Moments of a large matrix: 12 bytes in float32, 6 in bfloat16, 3.19 in codes."""
    measured = {}
    for state_dtype in (None, *LOW):
        params, optimizer = make(shapes=[(256, 512)], state_dtype=state_dtype)
        optimizer.init_state()
        tensors = optimizer.state[params[0]].values()
        size = sum(t.numel() * t.element_size() for t in tensors if t.dim())
        measured[state_dtype] = size / params[0].numel()
    assert measured == {None: 12.0, "bfloat16": 6.0, "8bit": 3 * (1 + 4 / BLOCK)}


@pytest.mark.parametrize("rho", [0.99, 0.999])
def test_stochastically_rounded_noise_is_unbiased(rho):
    """Mean of s_hat over its expectation: within 3 % in bfloat16, where nearest loses 30 %.

    E[s_hat] = sigma^2 (1 + c), c the variance of the bias-corrected mean before the step.
    """
    p = torch.nn.Parameter(torch.zeros(2000))
    optimizer = temporal([p], lr=0.0, rho=rho, state_dtype={"exp_dev_sq": "bfloat16"})
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-6, -2, 2000)
    for _ in range(int(2 / (1 - rho))):
        p.grad = sigma * torch.randn(2000, generator=generator)
        optimizer.step()
    state = optimizer.state[p]
    s_hat = state["exp_dev_sq"].double() / (1 - rho ** state["dev_step"].item())
    expected = sigma.double().square() * (1 + ema_mean_variance(0.9, 10_000))
    assert float((s_hat / expected).mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("key", MOMENTS)
def test_codes_are_unbiased_neighbours(key):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 150, generator=generator) * 10.0 ** torch.linspace(-4, 0, 150)
    if key != "exp_avg":
        values = values.square()
    draws = 2000
    draw = torch.randint(0, 65536, (draws, 3, 150), generator=generator, dtype=torch.int32)
    # several matrices at once, as the device path takes them
    codes, scale = encode_blocks(values.expand(draws, 3, 150), key, draw)
    mean = decode_blocks(codes, scale, key).double().mean(0)
    nearest = decode_blocks(*encode_blocks(values, key, None), key)
    assert codes.dtype == torch.uint8
    assert scale.shape == (draws, 3, 3)
    # levels are spaced 1.6 % (exp_avg: 1.6 %, squares: 1.6 %) of the block's largest value or less
    top = scale[0].repeat_interleave(BLOCK, 1)[:, :150]
    assert bool(((nearest - values).abs() <= 0.008 * top * 1.01).all())
    if key == "exp_avg_sq":  # positive values are never coded zero
        assert bool((codes[values.expand(draws, 3, 150) > 0] > 0).all())
    else:
        assert bool(((mean - values).abs() <= 5 * 0.008 * top / draws**0.5 + 1e-6 * top).all())


@pytest.mark.parametrize("key", MOMENTS)
def test_zeros_stay_zeros_and_empty_shards_have_codes_too(key):
    draw = torch.full((2, 70), 65535, dtype=torch.int32)
    assert not decode_blocks(*encode_blocks(torch.zeros(2, 70), key, draw), key).any()
    codes, scale = encode_blocks(torch.zeros(0, 70), key, None)
    assert (codes.shape, scale.shape) == ((0, 70), (0, 2))
    assert decode_blocks(codes, scale, key).shape == (0, 70)


@pytest.mark.parametrize("state_dtype", LOW)
@pytest.mark.parametrize("impl", TORCH[1:])
def test_paths_draw_the_same_and_another_seed_other_bits(impl, state_dtype):
    """The draws belong to (seed, step, parameter, element), not to the path."""
    found = []
    for flags, seed in ((FLAGS["single_tensor"], 0), (FLAGS[impl], 0), (FLAGS[impl], 7)):
        params, optimizer = make(BF16, state_dtype=state_dtype, rounding_seed=seed, **flags)
        run(params, optimizer, 3)
        found.append(torch.cat([p.detach().float().flatten() for p in params]))
    # float differences of the paths may move single codes by one level
    assert float((found[0] != found[1]).float().mean()) < 0.01
    assert float((found[1] != found[2]).float().mean()) > 0.05


@pytest.mark.parametrize("new", [None, *LOW])
@pytest.mark.parametrize("old", [None, *LOW])
def test_a_checkpoint_of_another_format_is_converted(old, new):
    params, saver = make(state_dtype=old, fused=False)
    run(params, saver, 3)
    clones = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loader = temporal(clones, lr=1e-2, state_dtype=new, fused=False)
    loader.load_state_dict(copied(saver.state_dict()))
    template, fresh = make(state_dtype=new)
    fresh.init_state()
    for p, q, t in zip(clones, params, template, strict=True):
        assert loader.state[p].keys() == fresh.state[t].keys()
        for name, value in fresh.state[t].items():
            assert loader.state[p][name].dtype == value.dtype
        assert loader.state[p]["step"] == saver.state[q]["step"]
    run(clones, loader, 1, start=3)
    run(params, saver, 1, start=3)
    for a, b in zip(clones, params, strict=True):
        assert float((a - b).detach().abs().max()) < 5e-3  # half a step of lr


@pytest.mark.parametrize("impl", TORCH)
def test_states_follow_a_model_that_becomes_float64(impl):
    layer = torch.nn.Linear(9, 5)
    optimizer = temporal(layer.parameters(), **FLAGS[impl])
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        layer(torch.ones(2, 9, dtype=dtype)).sum().backward()
        optimizer.step()
        states = [optimizer.state[p] for p in layer.parameters()]
        assert {state[name].dtype for state in states for name in MOMENTS} == {dtype}
        assert {float(state["step"]) for state in states} == {1.0 if dtype.itemsize == 4 else 2.0}
        optimizer.zero_grad()


def test_scales_of_another_shape_are_refused():
    params, saver = make(state_dtype="8bit", fused=False)
    run(params, saver, 1)
    broken = copied(saver.state_dict())
    broken["state"][1]["exp_avg_scale"] = torch.zeros(3, 9)
    with pytest.raises(ValueError, match=r"exp_avg_scale of parameter 1 .* not of shape \(70, 9\)"):
        saver.load_state_dict(broken)
