"""A hook that fails switches its callback off, says so once, and the run goes on."""

import logging

import pytest

from poprisk_integrations.diagnostics import guard
from poprisk_integrations.diagnostics.guard import Guarded, guarded


class Callback(Guarded):
    calls = 0

    @guarded
    def on_step_end(self, error):
        """The hook's own words."""
        self.calls += 1
        raise error

    @guarded
    def state_dict(self):
        return {"calls": self.calls}


def test_the_first_failure_is_told_and_the_rest_is_silence(caplog):
    callback = Callback()
    with caplog.at_level(logging.WARNING):
        assert callback.state_dict() == {"calls": 0}
        for _ in range(3):
            assert callback.on_step_end(RuntimeError("no memory")) is None
    assert callback.calls == 1
    assert callback.state_dict() is None
    (record,) = caplog.records
    assert "Callback is switched off for the rest of this run" in record.getMessage()
    assert "RuntimeError in on_step_end: no memory" in record.getMessage()


def test_an_interrupt_is_the_users():
    with pytest.raises(KeyboardInterrupt):
        Callback().on_step_end(KeyboardInterrupt())


def test_with_other_ranks_waiting_it_is_raised(monkeypatch):
    monkeypatch.setattr(guard, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="no memory"):
        Callback().on_step_end(RuntimeError("no memory"))
