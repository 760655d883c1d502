"""A file is whole or absent, whatever happens while it is written."""

import os

import pytest

from poprisk_integrations._files import write_whole


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("bad")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "report.json"
    target.write_text("old")

    def write():
        with write_whole(target) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_target_that_is_a_folder_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "report.json"
    target.mkdir()
    with pytest.raises(OSError, match=r"report\.json"), write_whole(target) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_directory_is_whole_or_absent(tmp_path):
    def write(name, error=None):
        with write_whole(tmp_path / name) as temporary:
            (temporary / "inner").mkdir(parents=True)
            if error is not None:
                raise error

    write("new")
    with pytest.raises(OSError, match="full"):
        write("other", OSError("disk full"))
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "new", tmp_path / "new" / "inner"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "a.csv"):
        pass
    assert os.listdir(tmp_path) == []


def test_the_extension_is_the_targets(tmp_path):
    """Writers that go by the extension (matplotlib, numpy, pandas) take the right format."""
    with write_whole(tmp_path / "deep" / "figure.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path / "deep"
        temporary.write_bytes(b"1")
    assert (tmp_path / "deep" / "figure.png").read_bytes() == b"1"
