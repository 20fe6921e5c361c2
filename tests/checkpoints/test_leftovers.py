import os

import pytest

from dlo_export.checkpoints.files.folder_lock import FolderLock
from dlo_export.checkpoints.files.leftovers import NAME_GROWTH, remove_leftover, remove_leftovers
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.files.written_files import LIST_NAME, list_files, mark_unfinished

PARTIAL, OLD = ".out.abcdefg_.partial", ".out.0bcdefgh.old"


def unfinished(folder):
    folder.mkdir()
    mark_unfinished(folder)
    (folder / "model.onnx.data").write_text("half")
    (folder / "engines").mkdir()
    return folder


def finished(folder, text="whole"):
    folder.mkdir()
    (folder / "model.onnx").write_text(text)
    list_files(folder)
    return folder


def test_unfinished_folders_are_removed_when_their_writer_is_dead(tmp_path):
    remove_leftovers(tmp_path / "missing")  # whoever writes there says so
    unfinished(tmp_path / PARTIAL)
    (tmp_path / ".killed.abcdefgh.partial").mkdir()  # before its writer could mark it
    unfinished(tmp_path / ".two\nlines.abcdefgh.partial")
    unfinished(tmp_path / ".a.b.abcdefgh.partial")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        *("out", ".out.partial", ".out.abcdefg.partial", ".out.abcdefghi.partial", ".out.ABCDEFGH.partial"),
        *("out.abcdefgh.partial", "..abcdefgh.partial", f"{PARTIAL}.txt", ".out.abcdefgh.oldest"),
    ],
)
def test_folder_stays_when_its_name_is_not_one_of_a_folder_under_way(tmp_path, name):
    unfinished(tmp_path / name)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path / name)) == [LIST_NAME, "engines", "model.onnx.data"]


def test_leftover_stays_when_somebody_holds_it(tmp_path):
    lock = FolderLock(unfinished(tmp_path / PARTIAL))
    remove_leftovers(tmp_path)
    assert (tmp_path / PARTIAL / "model.onnx.data").read_text() == "half"
    lock.release()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_links_and_files_stay_when_they_are_called_like_leftovers(tmp_path):
    unfinished(tmp_path / "mine")
    (tmp_path / PARTIAL).symlink_to("mine")
    (tmp_path / OLD).write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([OLD, PARTIAL, "mine"])
    assert (tmp_path / "mine" / "model.onnx.data").exists()


def test_replaced_folder_is_put_back_when_nothing_took_its_place(tmp_path):
    finished(tmp_path / OLD)
    unfinished(tmp_path / PARTIAL)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "whole"


def test_leftover_stays_when_it_is_what_is_read(tmp_path):
    finished(tmp_path / "out", "new")
    finished(tmp_path / OLD)
    for read in (tmp_path / OLD, tmp_path / OLD / "model.onnx"):
        remove_leftovers(tmp_path, [read])
        assert sorted(os.listdir(tmp_path)) == [OLD, "out"]
    remove_leftovers(tmp_path, [tmp_path / "out"])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("dangling", [False, True])
def test_replaced_folder_is_removed_when_its_place_is_taken(tmp_path, dangling):
    if dangling:
        (tmp_path / "out").symlink_to("nowhere")
    else:
        finished(tmp_path / "out", "new")
    finished(tmp_path / OLD)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
    assert dangling or (tmp_path / "out" / "model.onnx").read_text() == "new"


@pytest.mark.parametrize("name", [OLD, PARTIAL])
def test_finished_leftover_stays_whole_when_a_users_file_lies_in_it(tmp_path, name):
    finished(tmp_path / "out")
    (finished(tmp_path / name) / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path)
    remove_leftover(tmp_path / name)
    assert sorted(os.listdir(tmp_path / name)) == [LIST_NAME, "model.onnx", "notes.txt"]


def test_growth_of_a_name_is_what_folders_under_way_have_more_when_made(tmp_path):
    with whole_folder(tmp_path / "out") as staging:
        assert len(staging.name) - len("out") == NAME_GROWTH
