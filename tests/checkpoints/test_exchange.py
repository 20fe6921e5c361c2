"""Two folders change places in one step, or nothing happens."""

import errno

import pytest

from dlo_export.checkpoints.files.exchange import exchange


def test_folders_change_places_in_one_step(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    if not exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("this file system cannot exchange two folders")
    assert (tmp_path / "first" / "who").read_text() == "second"
    assert (tmp_path / "second" / "who").read_text() == "first"


def test_nothing_changes_when_one_folder_is_missing(tmp_path):
    (tmp_path / "first").mkdir()
    with pytest.raises(FileNotFoundError) as raised:
        exchange(tmp_path / "first", tmp_path / "missing")
    assert raised.value.errno == errno.ENOENT
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
