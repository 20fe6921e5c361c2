import subprocess
import sys

import pytest

from dlo_export.checkpoints.files.folder_lock import FolderLock

HOLD = (
    "import pathlib, sys; from dlo_export.checkpoints.files.folder_lock import FolderLock\n"
    "lock = FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_folder_is_free_again_when_its_holder_was_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            FolderLock(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    lock = FolderLock(tmp_path)
    assert lock.is_held
    lock.release()


def test_lock_follows_the_folder_when_it_is_renamed(tmp_path):
    (tmp_path / "first").mkdir()
    lock = FolderLock(tmp_path / "first")
    assert lock.holds(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    (tmp_path / "first").mkdir()
    assert not lock.holds(tmp_path / "first")
    assert lock.holds(tmp_path / "second")
    assert not lock.holds(tmp_path / "third")
    lock.release()
    lock.release()


def test_lock_is_refused_when_the_folder_is_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(OSError, match="link"):
        FolderLock(tmp_path / "link")
