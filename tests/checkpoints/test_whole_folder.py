"""Output folders: old or new, whole; nothing of a user's is ever replaced or removed."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import DloError, InputError, MachineError
from dlo_export.checkpoints.files import whole_folder as module
from dlo_export.checkpoints.files.folder_kind import FolderKind, folder_kind
from dlo_export.checkpoints.files.json_file import MAX_BYTES
from dlo_export.checkpoints.files.output_check import check_output_folder
from dlo_export.checkpoints.files.whole_folder import FolderExistsError, keep_aside, whole_folder
from dlo_export.checkpoints.files.written_files import LIST_NAME
from dlo_export.exporter.exit_codes import exit_code

OLD, NEW = {"model.onnx": "old", "engines/model.engine": "old"}, {"model.onnx": "new", "config.json": "new"}


def write(folder, files, *, overwrite=False, then=lambda: None):
    with whole_folder(folder, overwrite=overwrite) as staging:
        fill(staging, files)
        then()


def fail():
    raise ZeroDivisionError


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def written(folder):
    files = content(folder)
    del files[LIST_NAME]
    return files


@pytest.fixture
def out(tmp_path):
    write(tmp_path / "out", OLD)
    return tmp_path / "out"


def check_refused(folder, *words):
    """Not even with --force; what was there is still there."""
    before = content(folder)
    with pytest.raises(InputError) as caught:
        write(folder, NEW, overwrite=True)
    assert all(word in str(caught.value) for word in (folder.name, "hint:", *words)), caught.value
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_whole_folder_replaces_what_it_wrote_when_overwriting(out):
    write(out, NEW, overwrite=True)
    assert written(out) == NEW
    assert os.listdir(out.parent) == ["out"]


def test_whole_folder_is_its_owners_when_the_umask_takes_all(tmp_path):
    before = os.umask(0o777)
    try:
        write(tmp_path / "out", {})
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_whole_folder_keeps_the_old_when_the_block_fails(out):
    with pytest.raises(ZeroDivisionError):
        write(out, NEW, overwrite=True, then=fail)
    assert written(out) == OLD
    assert os.listdir(out.parent) == ["out"]


def test_whole_folder_leaves_no_parents_when_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a" / "b" / "out", NEW, then=fail)
    assert list(tmp_path.iterdir()) == []


def test_whole_folder_refuses_a_strangers_folder_when_overwriting(tmp_path):
    fill(tmp_path / "out", {"thesis.txt": "mine"})
    check_refused(tmp_path / "out", "thesis.txt", "not a folder that dlo-export wrote")


@pytest.mark.parametrize("name", ["notes.txt", "engines/notes.txt", "mine/deep/notes.txt", "model_int4.onnx"])
def test_whole_folder_refuses_its_own_folder_when_a_users_file_is_in_it(out, name):
    fill(out, {name: "mine"})
    check_refused(out, name.split("/")[-1] if "deep" not in name else "mine/")


def test_whole_folder_refuses_its_own_folder_when_a_users_empty_folder_or_link_is_in_it(out):
    (out / "results").mkdir()
    check_refused(out, "results/")
    (out / "results").rmdir()
    (out / "config.json").symlink_to(out / "model.onnx")
    check_refused(out, "config.json")


def test_whole_folder_refuses_its_own_folder_when_a_file_became_a_pipe(out):
    (out / "model.onnx").unlink()
    os.mkfifo(out / "model.onnx")
    with pytest.raises(FolderExistsError, match=r"not dlo-export's, .*: model\.onnx"):
        check_output_folder(out, overwrite=True)


def test_whole_folder_refuses_weights_when_they_were_trained_in_place(tmp_path):
    write(tmp_path / "out", {"model.safetensors": "weights"})
    os.utime(tmp_path / "out" / "model.safetensors", (1, 1))
    check_refused(tmp_path / "out", "model.safetensors (changed since it was written)")


def test_whole_folder_names_few_files_when_there_are_many(tmp_path):
    fill(tmp_path / "out", {f"{number}.txt": "mine" for number in range(1000)})
    check_refused(tmp_path / "out", "and 995 more")


@pytest.mark.parametrize("version", [0, 1, 99])
def test_whole_folder_replaces_an_artefact_of_any_version_when_it_has_no_list(tmp_path, version):
    fill(tmp_path / "out", {**OLD, "dlo_artifact.json": json.dumps({"format_version": version})})
    write(tmp_path / "out", NEW | PASSED, overwrite=True)
    assert written(tmp_path / "out") == NEW | PASSED
    assert os.listdir(tmp_path) == ["out"]


def test_whole_folder_refuses_an_adapter_of_another_tool_when_overwriting(tmp_path):
    fill(tmp_path / "out", {"adapter_config.json": '{"peft_type": "LORA"}', "adapter.safetensors": "x"})
    check_refused(tmp_path / "out", "adapter_config.json")


def test_whole_folder_refuses_links_whole_and_dangling(out):
    for target in (out, out.parent / "nothing"):
        link = out.parent / "link"
        link.symlink_to(target)
        with pytest.raises(FolderExistsError, match="is a link to"):
            write(link, NEW, overwrite=True)
        link.unlink()
    assert written(out) == OLD


def test_removal_stays_in_the_folder_when_its_list_leads_out(out):
    mine = out.parent / "mine"
    mine.write_text("mine")
    shutil.rmtree(out / "engines")
    (out / "engines").symlink_to(out.parent)
    listed = json.loads((out / LIST_NAME).read_text())
    listed["files"] |= {"../mine": {}, "engines/mine": {}, str(mine): {}}
    (out / LIST_NAME).write_text(json.dumps(listed))
    check_refused(out, "engines")
    (out / "engines").unlink()
    write(out, NEW, overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("place", ["input", "parent", "file", "adapter", "linked"])
def test_check_refuses_the_output_when_it_is_or_holds_an_input(out, place):
    (out.parent / "link").symlink_to(out)
    elsewhere = out.parent / "model"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").symlink_to(out / "model.onnx")
    read = {
        "input": out,
        "parent": out / "engines",
        "file": out / "model.onnx",
        "adapter": out.parent / "link",
        "linked": elsewhere,
    }[place]
    with pytest.raises(InputError, match=f"(is|holds) the input {read}"):
        check_output_folder(out, overwrite=True, inputs=[None, read, Path("no/such")])


def test_check_refuses_names_and_places_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    for name in (
        ".",
        "..",
        "/",
        "a/..",
        "file",
        "file/out",
        "dangling/out",
        "x" * 240,
        "x" * 5000,
        ".out.abcdefgh.partial",
        ".out.abcdefgh.old",
        "a\0b",
        "a/" * 3000,
    ):
        with pytest.raises(InputError, match="hint:"):
            check_output_folder(Path(name), overwrite=True)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(InputError, match="current folder"):
        check_output_folder(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_whole_folder_keeps_what_appeared_when_it_was_under_way(tmp_path, overwrite):
    with pytest.raises(FolderExistsError):
        write(tmp_path / "out", NEW, overwrite=overwrite, then=lambda: fill(tmp_path / "out", {"mine": "mine"}))
    assert content(tmp_path / "out") == {"mine": "mine"}
    assert os.listdir(tmp_path) == ["out"]


def test_one_of_two_writers_is_refused_when_both_make_one_folder(tmp_path):
    with pytest.raises(FolderExistsError):
        write(tmp_path / "out", NEW, then=lambda: write(tmp_path / "out", OLD))
    assert written(tmp_path / "out") == OLD


PASSED, FAILED = ({"dlo_artifact.json": json.dumps({"parity": {"verdict": verdict}})} for verdict in ("PASS", "FAIL"))
CHECKPOINT = {"config.json": "{}", "model-00001-of-00002.safetensors": "x"}
ADAPTER_FIELDS = {"format_version": 1, "routing": "mlp", "is_dlo": [], "injected_layers": []}
KINDS = {
    FolderKind.ARTEFACT: PASSED,
    FolderKind.FAILED_ARTEFACT: FAILED,
    FolderKind.ADAPTER: {"adapter_config.json": json.dumps(ADAPTER_FIELDS), "adapter.safetensors": "x"},
    FolderKind.CHECKPOINT: CHECKPOINT,
    FolderKind.TRAINED_CHECKPOINT: CHECKPOINT | {"training.json": "{}"},
    FolderKind.RUN_CHECKPOINT: CHECKPOINT | {"capacities.json": "{}"},
    FolderKind.OTHER: {"engine.json": "{}"},
}
REPLACED = {(kind, kind) for kind in FolderKind} | {
    (FolderKind.ARTEFACT, FolderKind.FAILED_ARTEFACT),
    (FolderKind.TRAINED_CHECKPOINT, FolderKind.CHECKPOINT),
}


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_whole_folder_replaces_a_folder_when_it_is_of_its_kind(tmp_path, new, old):
    write(tmp_path / "out", KINDS[old])
    assert folder_kind(tmp_path / "out") is old
    if (new, old) in REPLACED:
        check_output_folder(tmp_path / "out", overwrite=True, makes=new)
        write(tmp_path / "out", KINDS[new], overwrite=True)
        assert folder_kind(tmp_path / "out") is new
        return
    before = content(tmp_path / "out")
    message = f"out: is {old}, which --force does not replace with {new}"
    with pytest.raises(FolderExistsError, match=message):  # before the work
        check_output_folder(tmp_path / "out", overwrite=True, makes=new)
    with pytest.raises(FolderExistsError, match=message):  # and after it
        write(tmp_path / "out", KINDS[new], overwrite=True)
    assert content(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]


def test_kind_of_a_folder_stays_when_its_files_are_gone(tmp_path):
    write(tmp_path / "out", KINDS[FolderKind.TRAINED_CHECKPOINT])
    for name in KINDS[FolderKind.TRAINED_CHECKPOINT]:
        (tmp_path / "out" / name).unlink()
    assert folder_kind(tmp_path / "out") is FolderKind.TRAINED_CHECKPOINT


def test_folder_is_a_strangers_when_its_list_is_too_large(out):
    listed = (out / LIST_NAME).read_text()
    with (out / LIST_NAME).open("a") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: nothing of it is on the disk
    with pytest.raises(FolderExistsError, match="is not a folder that dlo-export wrote"):
        check_output_folder(out, overwrite=True)
    (out / LIST_NAME).write_text(listed + " " * 1000)
    check_output_folder(out, overwrite=True)


def kept_aside(out, files):
    """Writes a folder that turns out to be wrong; returns the name it was kept under."""

    def keep():
        (staging,) = out.parent.glob(f".{out.name}.*")
        kept.append(keep_aside(staging, out.with_name(f"{out.name}.failed")).name)
        fail()

    kept = []
    with pytest.raises(ZeroDivisionError):
        write(out, files, then=keep)
    return kept[0]


def test_keep_aside_keeps_what_passed_when_it_lies_there(tmp_path):
    write(tmp_path / "out.failed", PASSED)
    for _ in range(2):
        assert kept_aside(tmp_path / "out", FAILED) == "out.failed-2"
    assert written(tmp_path / "out.failed") == PASSED
    assert sorted(os.listdir(tmp_path)) == ["out.failed", "out.failed-2"]


def test_keep_aside_numbers_the_folder_when_something_else_lies_there(tmp_path):
    fill(tmp_path / "out.failed", {"model.safetensors": "mine"})
    for _ in range(2):
        assert kept_aside(tmp_path / "out", NEW) == "out.failed-2"
    assert content(tmp_path / "out.failed") == {"model.safetensors": "mine"}
    assert sorted(os.listdir(tmp_path)) == ["out.failed", "out.failed-2"]


@pytest.mark.parametrize("ended", [False, True], ids=["while it is filled", "when it is full"])
def test_whole_folder_says_so_when_somebody_removes_the_unfinished_one(tmp_path, ended):
    def remove():
        (unfinished,) = tmp_path.iterdir()
        shutil.rmtree(unfinished)
        if not ended:
            (unfinished / "more").write_text("")

    with pytest.raises(MachineError, match="was moved or removed by somebody"):
        write(tmp_path / "out", NEW, then=remove)
    assert os.listdir(tmp_path) == []


def is_refused(folder):
    try:
        check_output_folder(folder)
    except InputError:
        return True
    return False


def test_keep_aside_finds_room_when_the_name_is_as_long_as_may_be(tmp_path):
    name = "x" * 300
    while is_refused(tmp_path / name):
        name = name[1:]
    fill(tmp_path / f"{name}.failed", {"model.safetensors": "mine"})
    assert kept_aside(tmp_path / name, NEW) == f"{name}.failed-2"


def test_keep_aside_gives_up_when_there_is_no_place_for_it(tmp_path):
    with whole_folder(tmp_path / "out") as staging:
        fill(staging, NEW)
        with pytest.raises(InputError, match="bytes, at most"):
            keep_aside(staging, tmp_path / ("x" * 300))


SYSTEM_CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open", "chmod", "scandir")


class SystemCalls:
    """Counts system calls and does something instead of one of them, counted from 0."""

    def __init__(self, monkeypatch, which, act, *, exchanging=True):
        self.made, self._which, self._act = 0, which, act
        for name in SYSTEM_CALLS:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))
        monkeypatch.setattr(module, "exchange", self._watched(module.exchange) if exchanging else lambda *_: False)

    def _watched(self, function):
        def call(*arguments, **options):
            self.made += 1
            if self.made - 1 == self._which:
                self._act()
            return function(*arguments, **options)

        return call


def test_whole_folder_says_so_when_the_old_one_lies_in_an_images_layer(tmp_path):
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    write(tmp_path / "lower" / "out", OLD)
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounting = ["mount", "-t", "overlay", "overlay", "-o", layers, str(tmp_path / "merged")]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(FolderExistsError, match="in a lower layer of an overlay file system"):
            write(tmp_path / "merged" / "out", NEW, overwrite=True)
        assert written(tmp_path / "merged" / "out") == OLD
        assert os.listdir(tmp_path / "merged") == ["out"]
    finally:
        subprocess.run(["umount", str(tmp_path / "merged")], check=True)


@pytest.mark.parametrize("options", [("-t", "tmpfs", "tmpfs"), ("--bind", "{}")], ids=["another disk", "the same disk"])
def test_check_refuses_a_mount_point_before_the_work(tmp_path, options):
    out = tmp_path / "a volume"
    out.mkdir()
    (tmp_path / "other").mkdir()
    mounting = ["mount", *(option.format(tmp_path / "other") for option in options), str(out)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(InputError, match="is a mount point"):
            check_output_folder(out)
        check_output_folder(out / "model")
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.fixture
def tmp_path(tmp_path):
    """In memory, where there is such a file system: these tests have the disk hold hundreds of folders."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "renames"])
def test_whole_folder_is_old_or_new_when_any_system_call_fails(tmp_path, monkeypatch, number, exchanging):
    def refuse():
        raise OSError(number, os.strerror(number))

    which, codes = 0, []
    while True:
        out = tmp_path / str(which) / "out"
        write(out, OLD)
        with monkeypatch.context() as patch:
            calls = SystemCalls(patch, which, refuse, exchanging=exchanging)
            try:
                write(out, NEW, overwrite=True)
            except (DloError, OSError) as err:
                codes.append(exit_code(err))
        assert written(out) in (OLD, NEW), f"call {which}"
        write(out, NEW, overwrite=True)
        assert written(out) == NEW
        assert os.listdir(out.parent) == ["out"], f"call {which}"
        if calls.made <= which:
            break
        which += 1
    assert len(codes) > 10
    assert set(codes) <= {2, 4}


def write_and_be_killed(out, which, exchanging):
    """Writes, and is killed just before one of its system calls."""
    with pytest.MonkeyPatch.context() as patch:
        SystemCalls(patch, which, lambda: os.kill(os.getpid(), signal.SIGKILL), exchanging=exchanging)
        write(out, NEW, overwrite=True)


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "renames"])
def test_whole_folder_is_old_or_new_when_killed_before_any_system_call(tmp_path, exchanging):
    which, context = 0, multiprocessing.get_context("fork")
    while True:
        out = tmp_path / str(which) / "out"
        write(out, OLD)
        process = context.Process(target=write_and_be_killed, args=(out, which, exchanging))
        process.start()
        process.join()
        # Without an exchange there is a moment with neither in place; the next command puts the old one back.
        if exchanging or out.exists():
            assert written(out) in (OLD, NEW), f"call {which}"
        check_output_folder(out, overwrite=True)
        assert written(out) in (OLD, NEW), f"call {which}"
        assert os.listdir(out.parent) == ["out"], f"call {which}"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        which += 1
    assert which > 10


def test_leftovers_stay_when_their_writer_lives_or_they_are_not_ours(tmp_path):
    fill(tmp_path / ".out.abcdefgh.partial", {"mine": "mine"})
    fill(tmp_path / ".out.abcdefgh.old", {"mine": "mine"})
    with whole_folder(tmp_path / "out") as staging:
        fill(staging, NEW)
        write(tmp_path / "other", OLD)
        assert staging.is_dir()
    assert sorted(os.listdir(tmp_path)) == [".out.abcdefgh.old", ".out.abcdefgh.partial", "other", "out"]


@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_whole_folder_is_new_when_signals_come_before_any_step_of_the_swap(out, monkeypatch, number, exchanging):
    def stop(number, frame):
        raise KeyboardInterrupt

    came = []

    def interrupted(function):
        def call(*arguments):
            came.append(function.__name__)
            signal.raise_signal(number)
            signal.raise_signal(number)
            return function(*arguments)

        return call

    def refuse(first, second):
        return False

    before = signal.signal(number, stop)
    monkeypatch.setattr(module, "exchange", interrupted(module.exchange if exchanging else refuse))
    monkeypatch.setattr(os, "rename", interrupted(os.rename))
    try:
        with pytest.raises(KeyboardInterrupt):
            write(out, NEW, overwrite=True)
    finally:
        signal.signal(number, before)
    # The first rename finds the old folder in its way.
    assert came == ["rename", "exchange"] if exchanging else ["rename", "refuse", "rename", "rename"]
    assert written(out) == NEW
    assert os.listdir(out.parent) == ["out"]
