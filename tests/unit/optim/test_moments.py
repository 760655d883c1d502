"""noise_source="moments": AdamW's states and nothing else, and the share of noise that passes."""

import copy
import io

import pytest
import torch
from scipy import stats

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import moments_open_rate
from tests.helpers.optim_problem import feed, gradients, make_params, temporal, train
from tests.unit.optim.paths import EAGER, FLAGS, HOST, TORCH

ADAMW = {"step", "exp_avg", "exp_avg_sq"}


def ours(params, **options):
    return PopRiskAdamW(params, **{"lr": 1e-2, **options})


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=1e-2, **options)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_states(a, b):
    return all(
        a.state[p].keys() == b.state[q].keys() == ADAMW
        and all(torch.equal(a.state[p][key], b.state[q][key]) for key in ADAMW)
        for group, other in zip(a.param_groups, b.param_groups, strict=True)
        for p, q in zip(group["params"], other["params"], strict=True)
    )


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("options", [{"gate": "none"}, {"gate_blend": 0.0}], ids=str)
def test_without_a_gate_it_is_adamw_bit_for_bit(impl, options):
    params, optimizer = train(lambda p: ours(p, **options, **FLAGS[impl]))
    twins, reference = train(lambda p: adamw(p, foreach=impl == "foreach"))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert same_states(optimizer, reference)


@pytest.mark.parametrize("impl", EAGER)
def test_the_states_of_a_gated_run_are_adamws_of_the_same_gradients(impl):
    """The gate touches parameters only; so checkpoints of the two can be exchanged."""
    params, optimizer = train(lambda p: ours(p, **FLAGS[impl]), steps=20)
    twins, reference = train(lambda p: adamw(p, foreach=impl == "foreach"), steps=20)
    assert not torch.equal(params[0], twins[0])
    if impl in HOST:
        assert same_states(optimizer, reference)
    bytes_held = sum(t.nbytes for t in optimizer.state[params[0]].values() if t.dim())
    assert bytes_held == 8 * params[0].numel()


def continued(optimizer, params, rows):
    for row in rows:
        feed(params, row)
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_an_adamw_run_continues_gated_from_its_checkpoint():
    """At once: there is no noise to be measured first."""
    history = gradients(12)
    params, reference = train(adamw, history=history[:8])
    whole, gated = copy.deepcopy(params), copy.deepcopy(params)
    optimizer = ours(gated)
    optimizer.load_state_dict(through_a_file(reference.state_dict()))
    assert same_states(optimizer, reference)
    # the same states under our own name from the start
    other, mine = train(ours, history=history[:8])
    with torch.no_grad():
        for p, q in zip(other, whole, strict=True):
            p.copy_(q)
    expected = continued(mine, other, history[8:])
    assert all(map(torch.equal, continued(optimizer, gated, history[8:]), expected))


def test_an_adamw_run_continues_from_our_checkpoint():
    history = gradients(12)
    params, optimizer = train(ours, history=history[:8])
    taken, kept = copy.deepcopy(params), copy.deepcopy(params)
    reference, twin = adamw(taken), adamw(kept)
    reference.load_state_dict(through_a_file(optimizer.state_dict()))
    for param, source in zip(kept, params, strict=True):
        twin.state[param] = copy.deepcopy(optimizer.state[source])
    assert same_states(optimizer, reference)
    expected = continued(twin, kept, history[8:])
    assert all(map(torch.equal, continued(reference, taken, history[8:]), expected))


def test_states_of_another_source_are_left_behind_and_missing_ones_start():
    params, source = train(temporal, steps=6)
    optimizer = ours(copy.deepcopy(params))
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    assert optimizer.param_groups[0]["noise_source"] == "moments"
    assert all(state.keys() == ADAMW for state in optimizer.state.values())
    back = temporal(copy.deepcopy(params))
    back.load_state_dict(through_a_file(optimizer.state_dict()))
    found = back.param_groups[0]["params"]
    continued(back, found, gradients(4))
    assert [back.state[p]["dev_step"].item() for p in (found[0], found[1])] == [4, 2]
    for group in source.param_groups:  # changed in the middle of a run
        group["noise_source"] = "moments"
    continued(source, params, gradients(2))
    assert all(state.keys() == ADAMW for state in source.state.values())


@pytest.mark.parametrize(
    ("state_dtype", "bytes_each"), [("bfloat16", 4.0), ("8bit", 2 * (1 + 4 / 64))]
)
def test_low_precision_states(state_dtype, bytes_each):
    param = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = ours([param], state_dtype=state_dtype)
    for _ in range(3):
        param.grad = torch.randn(64, 128)
        optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[param].values() if t.dim())
    assert held == bytes_each * param.numel()
    twin = ours([torch.nn.Parameter(param.detach().clone())], state_dtype=state_dtype)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    grad = torch.randn(64, 128)
    for run in (optimizer, twin):
        run.param_groups[0]["params"][0].grad = grad.clone()
        run.step()
    assert torch.equal(twin.param_groups[0]["params"][0], param)


@pytest.mark.parametrize("impl", TORCH)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_gate_does_not_know_the_scale_of_the_loss(impl, scale):
    shares = []
    for factor in (1.0, scale):
        _, optimizer = train(
            lambda p: ours(p, collect_stats_every=1, **FLAGS[impl]),
            history=gradients(8, scale=factor),
        )
        shares.append(float(optimizer.gate_stats()["open_fraction"]))
    assert shares[0] == shares[1]
    assert 0 < shares[0] < 1


def open_share(optimizer, param, draw, burn, looks, gap):
    """Mean open fraction over some steps, so far apart that m is new at each."""
    found = []
    for step in range(burn + looks * gap):
        param.grad = draw(step)
        optimizer.step()
        if step >= burn and step % gap == 0:
            found.append(float(optimizer.gate_stats()["open_fraction"]))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("betas", "rate", "options"),
    [
        ((0.9, 0.999), 0.3173, {}),
        ((0.9, 0.999), 0.05, {}),
        ((0.9, 0.999), 0.05, {"state_dtype": "bfloat16"}),
        ((0.9, 0.95), 0.05, {}),  # of language models
        ((0.9, 0.95), 0.01, {"dtype": torch.float64}),
        ((0.95, 0.9), 0.05, {"dtype": torch.bfloat16}),
        ((0.5, 0.9), 0.3173, {}),
    ],
    ids=str,
)
def test_share_of_pure_noise_that_passes(betas, rate, options):
    """Contract: within 10 % after burn-in. Sampling error: 40 000 looks, 2.2 % of 0.05."""
    options, gap = dict(options), round(2 / (1 - betas[0]))
    dtype = options.pop("dtype", torch.float32)
    param = torch.nn.Parameter(torch.zeros(4000, dtype=dtype))
    optimizer = ours(
        [param], lr=0.0, betas=betas, false_open_rate=rate, collect_stats_every=gap, **options
    )
    generator = torch.Generator().manual_seed(7)
    share = open_share(
        optimizer,
        param,
        lambda _: torch.randn(4000, generator=generator).to(dtype),
        burn=120,
        looks=10,
        gap=gap,
    )
    assert share == pytest.approx(rate, rel=0.1)


def test_share_that_passes_while_v_is_young():
    """v_hat of t gradients is not yet known, and m^2 / v has Student's law: no more pass.

    (m_hat / sqrt(c t v_hat))^2 is beta(1/2, (t-1)/2) for a second average of equal weights, which
    that of beta2 = 0.9999 is at step 60.
    """
    param = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = ours(
        [param], lr=0.0, betas=(0.9, 0.9999), false_open_rate=0.05, collect_stats_every=1
    )
    generator = torch.Generator().manual_seed(7)
    share = open_share(
        optimizer, param, lambda _: torch.randn(100_000, generator=generator), 59, 1, 1
    )
    alpha = optimizer_alpha(optimizer)
    bound = alpha / (1 + alpha) / (0.1 / 1.9 * 60)
    expected = stats.beta.sf(bound, 0.5, 59 / 2)
    assert share == pytest.approx(expected, rel=0.05)
    assert expected == pytest.approx(0.05, rel=0.1)


def optimizer_alpha(optimizer):
    from poprisk_integrations.core import resolve_alpha

    beta1, beta2 = optimizer.param_groups[0]["betas"]
    return resolve_alpha("calibrated", beta1=beta1, beta2=beta2, false_open_rate=0.05)


def test_a_mean_that_fades_closes_and_one_that_grows_opens():
    """v remembers longer than m: the bias that the documentation names."""
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = ours([param], lr=0.0, gate="hard", alpha=1.0, collect_stats_every=1)
    generator = torch.Generator().manual_seed(0)
    fades, grows = [3.0] * 100 + [0.5] * 60, [0.0] * 100 + [3.0] * 60
    for mean in zip(fades, grows, strict=True):
        param.grad = torch.tensor(mean) + 0.01 * torch.randn(2, generator=generator)
        optimizer.step()
    v, m = optimizer.state[param]["exp_avg_sq"], optimizer.state[param]["exp_avg"]
    noise = v / (1 - 0.999**160) - (m / (1 - 0.9**160)).square()
    assert float(noise[0]) > 1  # of a true 1e-4
    assert float(noise[1]) < 0
    assert float(optimizer.gate_stats()["open_fraction"]) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"noise_source": "moment"},
            r"Invalid noise_source: 'moment'\. Must be one of .*'moments'",
        ),
        ({"betas": (0.0, 0.999)}, r"Invalid false_open_rate: 0\.3173\. .*above 0\.32"),
        ({"false_open_rate": 1e-6}, r"Invalid false_open_rate: 1e-06\. .*above 1\.1e-05"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ours(make_params(), **options)


def test_options_that_do_nothing_are_named_once(caplog):
    options = {"state_dtype": {"exp_avg": "bfloat16", "exp_dev_sq": "bfloat16"}}

    def groups():
        params = make_params()
        ungated = {"params": params[2:3], "gate": "none", "rho": 0.5}
        return [*({"params": [p], "rho": 0.9} for p in params[:2]), ungated]

    PopRiskAdamW(groups(), **options)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("PopRiskAdamW(rho=0.9) does nothing with noise_source='moments'")
    assert lines[1].startswith("PopRiskAdamW(state_dtype of exp_dev_sq) does nothing")
    caplog.clear()
    temporal(groups(), **options)
    PopRiskAdamW(make_params(), state_dtype="bfloat16")
    assert not caplog.records


def test_a_checkpoint_of_another_source_is_reported(caplog):
    _, source = train(temporal, steps=2)
    optimizer = PopRiskAdamW(make_params())
    optimizer.load_state_dict(source.state_dict())
    (record,) = caplog.records
    assert "noise_source='temporal', this PopRiskAdamW has 'moments'" in record.getMessage()
    caplog.clear()
    for other in (train(temporal, steps=2)[1], train(adamw, steps=2)[1]):
        temporal(make_params()).load_state_dict(other.state_dict())
    ungated = train(lambda p: temporal(p, gate="none"), steps=2)[1]
    PopRiskAdamW(make_params(), gate="none").load_state_dict(ungated.state_dict())
    assert not caplog.records


def test_a_rate_out_of_reach_is_no_matter_without_a_gate():
    optimizer = ours(make_params(), betas=(0.0, 0.999), gate="none")
    assert optimizer.param_groups[0]["noise_source"] == "moments"
    assert moments_open_rate((0.0, 0.999), 1.0) > 0.3173
