"""An unfinished window is saved and continued, or refused in one line."""

import copy
import dataclasses
import io

import pytest
import torch

from poprisk_integrations.diagnostics import GradientWindow, window_fits

SHAPES = ((300, 250), (5,), (0,), (3,))


def make():
    return [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]


def run(window, params, steps, last_has_gradient=True):
    """Steps that depend on their number alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.data.copy_(torch.randn(p.shape, generator=generator))
            p.grad = torch.randn(p.shape, generator=generator) + 0.1
        if step == 2:
            params[1].grad[0] = float("nan")
        if not last_has_gradient:
            params[-1].grad = None
        window.add(params)


def saved(window):
    buffer = io.BytesIO()
    torch.save(window.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def numbers(result):
    return [
        x.tolist() if isinstance(x, torch.Tensor) else x
        for x in (getattr(result, f.name) for f in dataclasses.fields(result))
    ]


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize(
    ("steps", "at"), [(8, 0), (8, 1), (8, 3), (8, 8), (8, 11), (72, 23), (72, 24), (72, 71)]
)
def test_resumed_equals_uninterrupted_bitwise(accumulator, steps, at):
    """Of 72 steps only 1 and 2, 4 and 5, ... are read for a pair. Saving itself changes nothing."""

    def windows():
        return GradientWindow(steps, accumulator=accumulator)

    results = []
    for is_resumed in (False, True):
        window, params = windows(), make()
        results.append([])
        for step in range(2 * steps if steps == 8 else steps):
            if is_resumed and step % 3 == 0:
                window.state_dict()
            if is_resumed and step == at:
                state, window, params = saved(window), windows(), make()
                window.load_state_dict(state)
                assert saved(window).keys() == state.keys()
            run(window, params, [step])
            if window.is_full:
                results[-1].append(str(numbers(window.close())))  # NaN equals NaN
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("before", "after", "at"),
    [
        ({"steps": 8}, {"steps": 72}, 7),
        ({"steps": 8, "measure_risk": False}, {"steps": 8}, 4),
    ],
    ids=["other pairs", "no pairs"],
)
def test_a_state_with_other_pairs_or_none_continues_without_them(before, after, at):
    window, other = GradientWindow(**before), GradientWindow(**after)
    run(window, make(), range(at))
    other.load_state_dict(window.state_dict())
    run(other, make(), range(at, after["steps"]))
    result = other.close()
    assert result.steps == after["steps"] - 1
    assert result.risk_decrease == result.risk_decrease


def test_state_holds_what_was_measured():
    window, params = GradientWindow(8), make()
    assert window.state_dict()["counted"] is None
    run(window, params, range(4), last_has_gradient=False)
    state = window.state_dict()
    assert state["norm_sq"].shape == (4, 4)
    assert (state["seen"], int(state["counted"])) == (4, 3)
    assert state["products"].shape == (4, 5)
    assert list(state["sums"]) == ["0", "1", "2"]
    assert window_fits(state, make())


def test_a_state_of_another_accumulator_is_refused():
    window, params = GradientWindow(8, accumulator="sample"), make()
    run(window, params, range(2))
    with pytest.raises(ValueError, match="accumulator='sample', the window has 'exact'"):
        GradientWindow(8, accumulator="exact").load_state_dict(window.state_dict())
    other = GradientWindow(8)
    other.load_state_dict(window.state_dict())
    run(other, params, [2])  # who only watches a run must not end it
    assert (other.seen, other.restarts) == (1, 1)


@pytest.mark.parametrize("accumulator", ["exact", "sample"])
@pytest.mark.parametrize("wrong", [slice(0, 3), slice(None, None, -1)], ids=["fewer", "order"])
def test_a_state_of_other_shapes_is_given_up(accumulator, wrong):
    window, params = GradientWindow(8, accumulator=accumulator), make()
    run(window, params, range(2))
    state = window.state_dict()
    assert window_fits(state, make())
    assert not window_fits(state, make()[wrong])
    other = GradientWindow(8, accumulator=accumulator)
    other.load_state_dict(state)
    run(other, params[wrong], [3])
    assert (other.seen, other.restarts) == (1, 1)


def test_a_state_of_an_older_version_is_refused():
    old = {"seen": 1, "counted": None, "sums": {}, "sq": {}}
    assert not window_fits(old, make())
    with pytest.raises(ValueError, match="Invalid state of a window: it lacks accumulator"):
        GradientWindow(8).load_state_dict(old)


def test_a_loaded_state_is_a_copy_and_a_close_without_parameters_drops_it():
    window, params = GradientWindow(8), make()
    run(window, params, range(3))
    state = window.state_dict()
    kept = copy.deepcopy(state)
    other = GradientWindow(8)
    other.load_state_dict(state)
    run(other, params, range(3, 8))
    assert torch.equal(state["sums"]["0"], kept["sums"]["0"])
    idle = GradientWindow(8)
    idle.load_state_dict(state)
    assert idle.close() is None
    assert idle.state_dict()["seen"] == 0
