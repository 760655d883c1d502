import pytest

from poprisk_integrations.diagnostics import auto_window_steps


@pytest.mark.parametrize(
    ("max_steps", "epoch_steps", "window"),
    [
        (3000, 100, 100),
        (800, 100, 100),
        (799, 100, 33),
        (100, 100, 33),
        (120, 4, 8),
        (20, 20, 8),
        (1000, None, 50),
        (100, None, 8),
        (None, 100, 100),
        (None, None, 8),
    ],
)
def test_rule(max_steps, epoch_steps, window):
    assert auto_window_steps(max_steps, epoch_steps) == window


@pytest.mark.parametrize("epoch_steps", [24, 40, 100])
@pytest.mark.parametrize("epochs", [2, 3, 5, 8, 20])
def test_two_windows_and_as_much_again_fit_into_the_run(epoch_steps, epochs):
    """The earliest stop at a constant learning rate: two windows to the onset, twice that."""
    total = epochs * epoch_steps
    assert 4 * auto_window_steps(total, epoch_steps) <= total
