"""States in bfloat16 and in 8-bit codes: formats, bias, checkpoints."""

import io

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core.noise import ema_mean_variance
from poprisk_integrations.optim._block_codes import BLOCK, decode_blocks, encode_blocks

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_dev_sq")
LOW = ("bfloat16", "8bit")
SHAPES = ((64, 100), (70, 64, 3, 3), (5000,), (40, 90), (5000, 8))


def make(dtype=torch.float32, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    return params, PopRiskAdamW(params, lr=1e-2, **options)


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


def test_what_is_coded_is_decided_by_the_shape():
    params, optimizer = make(state_dtype="8bit")
    run(params, optimizer, 1)
    # a vector, a small matrix and short rows stay float32
    coded = ["exp_avg_codes" in optimizer.state[p] for p in params]
    assert coded == [True, True, False, False, False]
    state = optimizer.state[params[1]]
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_codes"].shape == params[1].shape
    assert state["exp_avg_scale"].shape == (70, 9)  # 576 per row in blocks of 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", {"exp_dev_sq": "bfloat16"}], ids=str)
def test_formats_do_not_follow_the_parameter(dtype, state_dtype):
    params, optimizer = make(dtype, state_dtype=state_dtype)
    run(params, optimizer, 2)
    wanted = state_dtype if isinstance(state_dtype, dict) else dict.fromkeys(MOMENTS, state_dtype)
    for p in params:
        for key in MOMENTS:
            expected = torch.bfloat16 if wanted.get(key) else torch.float32
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
    optimizer = PopRiskAdamW([p], lr=0.0, rho=rho, state_dtype={"exp_dev_sq": "bfloat16"})
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
    total = torch.zeros(3, 150, dtype=torch.float64)
    draws = 2000
    for _ in range(draws):
        draw = torch.randint(0, 65536, values.shape, generator=generator, dtype=torch.int32)
        codes, scale = encode_blocks(values, key, draw)
        total += decode_blocks(codes, scale, key)
    nearest = decode_blocks(*encode_blocks(values, key, None), key)
    assert codes.dtype == torch.uint8
    assert scale.shape == (3, 3)
    # levels are spaced 1.6 % (exp_avg: 1.6 %, squares: 1.6 %) of the block's largest value or less
    top = scale.repeat_interleave(BLOCK, 1)[:, :150]
    assert bool(((nearest - values).abs() <= 0.008 * top * 1.01).all())
    if key == "exp_avg_sq":  # positive values are never coded zero
        assert bool((codes[values > 0] > 0).all())
        return
    error = (total / draws - values).abs()
    assert bool((error <= 5 * 0.008 * top / draws**0.5 + 1e-6 * top).all())


def test_zeros_stay_zeros():
    zeros = torch.zeros(2, 70)
    for key in MOMENTS:
        codes, scale = encode_blocks(zeros, key, torch.full((2, 70), 65535, dtype=torch.int32))
        assert not decode_blocks(codes, scale, key).any()


def test_empty_shards_have_codes_too():
    empty = torch.zeros(0, 70)
    codes, scale = encode_blocks(empty, "exp_avg", None)
    assert codes.shape == (0, 70)
    assert scale.shape == (0, 2)
    assert decode_blocks(codes, scale, "exp_avg").shape == (0, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", LOW)
def test_paths_draw_the_same(state_dtype, dtype):
    """The draws belong to (seed, step, parameter, element), not to the path."""
    results = []
    for options in ({}, {"foreach": True}, {"capturable": True}):
        params, optimizer = make(dtype, state_dtype=state_dtype, fused=False, **options)
        run(params, optimizer, 5)
        results.append(params)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            # float differences of the paths may move single codes by one level
            assert float(((a - b).abs() > 1e-6 + 1e-5 * b.abs()).double().mean()) < 0.01


@pytest.mark.parametrize("state_dtype", LOW)
def test_another_seed_draws_other_bits(state_dtype):
    states = []
    for seed in (0, 0, 7):
        params, optimizer = make(state_dtype=state_dtype, rounding_seed=seed, fused=False)
        run(params, optimizer, 2)
        state = optimizer.state[params[0]]
        states.append(state.get("exp_avg", state.get("exp_avg_codes")))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", LOW)
def test_resumed_equals_uninterrupted_bitwise(state_dtype, dtype):
    params, optimizer = make(dtype, state_dtype=state_dtype, fused=False)
    run(params, optimizer, 8)
    first, saver = make(dtype, state_dtype=state_dtype, fused=False)
    run(first, saver, 4)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in first]
    loader = PopRiskAdamW(resumed, lr=1e-2, state_dtype=state_dtype, fused=False)
    loader.load_state_dict(copied(saver.state_dict()))
    run(resumed, loader, 4, start=4)
    assert all(map(torch.equal, resumed, params))
    for p, q in zip(resumed, params, strict=True):
        for name, value in optimizer.state[q].items():
            assert torch.equal(loader.state[p][name], value), name
            assert loader.state[p][name].dtype == value.dtype


@pytest.mark.parametrize("new", [None, *LOW])
@pytest.mark.parametrize("old", [None, *LOW])
def test_a_checkpoint_of_another_format_is_converted(old, new):
    params, saver = make(state_dtype=old, fused=False)
    run(params, saver, 3)
    clones = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loader = PopRiskAdamW(clones, lr=1e-2, state_dtype=new, fused=False)
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


def test_scales_of_another_shape_are_refused():
    params, saver = make(state_dtype="8bit", fused=False)
    run(params, saver, 1)
    broken = copied(saver.state_dict())
    broken["state"][1]["exp_avg_scale"] = torch.zeros(3, 9)
    with pytest.raises(ValueError, match=r"exp_avg_scale of parameter 1 .* not of shape \(70, 9\)"):
        saver.load_state_dict(broken)


def test_a_skipped_step_leaves_codes_as_they_are():
    for options in ({}, {"capturable": True}):
        params, optimizer = make(state_dtype="8bit", fused=False, **options)
        run(params, optimizer, 3)
        before = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
        for p in params:
            p.grad = torch.full_like(p, torch.nan)
        optimizer.step()
        for name, value in before.items():
            assert torch.equal(optimizer.state[params[0]][name], value), name
        assert optimizer.skipped_nonfinite == 1


@pytest.mark.parametrize("state_dtype", LOW)
def test_training_goes_as_well_as_with_float32_states(state_dtype):
    losses = {}
    for chosen in (None, state_dtype):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)
        )
        teacher = torch.nn.Linear(64, 64)
        optimizer = PopRiskAdamW(model.parameters(), lr=3e-3, state_dtype=chosen, fused=False)
        for _ in range(100):
            x = torch.randn(64, 64)
            loss = (model(x) - teacher(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[chosen] = loss.item()
    assert losses[state_dtype] < 1.15 * losses[None]
