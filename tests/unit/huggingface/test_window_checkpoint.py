import torch

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.huggingface.callbacks.window_checkpoint import (
    WINDOW_FILE,
    load_window,
    save_window,
)


def _params():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(()))]


def _add(window, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    window.add(params)


def test_an_unfinished_window_continues_bitwise(tmp_path):
    params, whole, first = _params(), GradientWindow(4), GradientWindow(4)
    for seed in range(4):
        _add(whole, params, seed)
    for seed in range(3):
        _add(first, params, seed)
    save_window(first, str(tmp_path), step=3)
    second = GradientWindow(4)
    second.load_state_dict(load_window(str(tmp_path), 3, params))
    _add(second, params, 3)
    assert second.is_full
    assert second.close().ratio == whole.close().ratio
    assert [p.name for p in tmp_path.iterdir()] == [WINDOW_FILE]


def test_what_does_not_fit_is_not_loaded(tmp_path):
    params, window = _params(), GradientWindow(4)
    assert load_window(str(tmp_path), 1, params) is None
    _add(window, params, 0)
    save_window(window, str(tmp_path), step=1)
    assert load_window(str(tmp_path), 1, params) is not None
    assert load_window(str(tmp_path), 2, params) is None
    assert load_window(str(tmp_path), 1, params[:1]) is None
    assert load_window(str(tmp_path), 1, params[::-1]) is None


def test_a_window_without_gradients_is_saved_too(tmp_path):
    window = GradientWindow(4)
    window.add([torch.nn.Parameter(torch.zeros(2))])
    save_window(window, str(tmp_path), step=1)
    state = load_window(str(tmp_path), 1, _params())
    assert (state["seen"], state["sums"], state["norm_sq"]) == (1, {}, None)
