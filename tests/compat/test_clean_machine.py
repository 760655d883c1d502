"""A new machine, as `clean_machine` makes one; what it is for takes minutes and is run by hand."""

from pathlib import Path

import pytest

from tests.compat.clean_machine import Machine


def test_a_command_sees_nothing_of_this_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/warm/cache")
    monkeypatch.setenv("PYTHONPATH", "/a/checkout")
    step = Machine(tmp_path).run("echo $HOME ${XDG_CACHE_HOME-} ${PYTHONPATH-}; ls -A ~", tmp_path)
    assert step.output == f"{tmp_path / 'home'}\n"
    assert step.first is not None
    assert 0 <= step.first <= step.seconds


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        Machine(tmp_path).run("echo no such thing >&2; false", tmp_path)
