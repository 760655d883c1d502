"""`poprisk dpo` with `resume_from_checkpoint: true` takes the newest whole checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from poprisk_integrations.cli.commands.dpo import _checkpoint
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.trl.label_noise_callback import LABELS_FILE


def test_which_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"stateful_callbacks": {}}')
    whole = tmp_path / "checkpoint-2"
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name / LABELS_FILE).write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"stateful_call')

    def taken(asked: object) -> object:
        return _checkpoint(SimpleNamespace(resume_from_checkpoint=asked, output_dir=tmp_path))

    assert taken(True) == taken("true") == str(whole)
    assert taken(None) is None
    assert taken("some/where") == "some/where"
    (whole / LABELS_FILE).unlink()
    with pytest.raises(UsageError, match="no whole checkpoint in"):
        taken(True)
