"""The pictures that explain the gate in the READMEs of core and optim."""

import pytest
from pictures import __main__ as pictures


@pytest.mark.parametrize(
    ("alpha", "signal", "expected"), [(pictures.DEFAULT, 0.0, 0.3173), (1.0, 1.0, 0.50)]
)
def test_the_shares_are_those_of_the_table(alpha, signal, expected):
    """Calibrated: as often as asked for. Published: 50 %, as open_fraction measured."""
    assert pictures.share_above(alpha, signal) == pytest.approx(expected, abs=0.01)


def test_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pictures", "--out", str(tmp_path)])
    pictures.main()
    for name in ("gate", "two_coordinates"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
