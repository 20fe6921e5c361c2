"""Where commands write: refused before the work where it cannot be, and never over anything of a user's."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.exporter.commands.export import default_output
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE, MACHINE
from dlo_export.exporter.export import ExportRequest, ParityFailedError, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.plan import TensorRtRequest
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.artefact.files import verify_files
from tests.exporter.forked_commands import run as dlo
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

COMMANDS = ("export", "expand", "calibrate")


@pytest.fixture
def model(tmp_path):
    return save_tiny_llama(tmp_path / "model", layers=2)


def digests(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(result, *words):
    assert result.returncode == BAD_INPUT, result.stderr
    assert all(word in result.stderr for word in (*words, "hint:")), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_refuses_its_output_before_the_work_when_it_is_a_strangers(tmp_path, command):
    # There is no such model: had the command begun its work, it would have said so.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    check_refused(dlo(command, tmp_path / "nothing", "-o", tmp_path / "out", "--force"), "thesis.txt")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_refuses_its_output_when_it_is_its_own_input(tmp_path, model, command):
    assert dlo("expand", model, "-o", tmp_path / "deep", "--every", "1").returncode == DONE
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    before = digests(tmp_path)
    check_refused(dlo(command, tmp_path / "deep", "-o", tmp_path / "deep", "--force"), "is the input")
    check_refused(dlo(command, tmp_path / "link", "-o", tmp_path / "deep", "--force"), "is the input")
    check_refused(dlo(command, tmp_path / "deep", "-o", tmp_path / "link", "--force"), "link")
    assert digests(tmp_path) == before


def test_export_refuses_its_output_when_it_is_its_adapter_or_holds_it(tmp_path, model):
    adapter = tmp_path / "art" / "adapter"
    assert dlo("expand", model, "-o", adapter, "--every", "1", "--adapter").returncode == DONE
    before = digests(tmp_path)
    for out in (adapter, adapter.parent):
        check_refused(dlo("export", model, "--adapter", adapter, "-o", out, "--force"), "the input")
    assert digests(tmp_path) == before


def test_export_replaces_its_artefact_but_no_users_file_in_it(tmp_path, model):
    out = tmp_path / "out"
    export = ("export", model, "-o", out, "--no-parity")
    assert dlo(*export).returncode == DONE
    check_refused(dlo(*export), "not empty")
    (out / "dlo_artifact.json").write_text('{"format_version": 99}')
    assert dlo(*export, "--force").returncode == DONE
    (out / "notes.txt").write_text("mine")
    check_refused(dlo(*export, "--force"), "notes.txt")
    assert (out / "notes.txt").read_text() == "mine"


def test_expand_replaces_its_adapter_when_forced(tmp_path, model):
    expand = ("expand", model, "-o", tmp_path / "out", "--adapter", "--every")
    assert dlo(*expand, "1").returncode == DONE
    assert dlo(*expand, "2", "--force").returncode == DONE
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["injected_layers"]) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter.safetensors", "adapter_config.json"]


@pytest.mark.parametrize(
    "command",
    [
        ("expand", "--every", "1"),
        ("expand", "--every", "1", "--adapter"),
        ("calibrate",),
        ("calibrate", "--as-adapter"),
        ("calibrate", "--adapter"),
    ],
    ids=" ".join,
)
def test_command_refuses_its_output_before_the_work_when_its_disk_is_too_small(tmp_path, command):
    """A full file system, where one can be mounted."""
    model = save_tiny_llama(tmp_path / "model", hidden=64, vocab=BYTE_VOCABULARY, tokenizer=True)
    if "--adapter" in command and command[0] == "calibrate":
        adapter = tmp_path / "adapter"
        assert dlo("expand", model, "-o", adapter, "--every", "1", "--adapter").returncode == DONE
        command = (*command, adapter)
    (tmp_path / "small").mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with contextlib.suppress(OSError), (tmp_path / "small" / "full").open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        result = dlo(command[0], model, "-o", tmp_path / "small" / "out", *command[1:])
        assert result.returncode == MACHINE, result.stderr
        assert "free, the weights need" in result.stderr
        assert os.listdir(tmp_path / "small") == ["full"]
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


@pytest.fixture
def read_only(tmp_path):
    """Makes folders read-only, until the test ends."""
    made = []

    def make(folder):
        made.append(folder)
        folder.chmod(0o555)

    yield make
    for folder in made:
        folder.chmod(0o755)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_refuses_its_output_before_the_work_when_its_place_is_read_only(tmp_path, command, read_only):
    place = tmp_path / "place"
    place.mkdir()
    read_only(place)
    result = dlo(command, tmp_path / "nothing", "-o", place / "deep" / "out", privileged=False)
    assert result.returncode == MACHINE, result.stderr
    assert f"{place} cannot be written to" in result.stderr
    assert "hint:" in result.stderr


@pytest.mark.parametrize("inside", [".", "engines"])
def test_export_refuses_its_output_before_the_work_when_nothing_in_it_can_be_removed(
    tmp_path, model, read_only, inside
):
    out = tmp_path / "out"
    with whole_folder(out) as staging:
        (staging / "engines").mkdir()
        for name in ("dlo_artifact.json", "engines/model.onnx"):
            (staging / name).write_text("{}")
    read_only(out / inside)
    before = digests(tmp_path)
    check_refused(dlo("export", tmp_path / "nothing", "-o", out, "--force", privileged=False), "can be removed from")
    assert digests(tmp_path) == before


def test_export_reads_a_model_that_is_read_only_and_names_a_file_that_it_may_not_read(tmp_path, model, read_only):
    read_only(model)
    assert dlo("export", model, "-o", tmp_path / "out", "--no-parity", privileged=False).returncode == DONE
    (model / "config.json").chmod(0)
    check_refused(dlo("export", model, "-o", tmp_path / "out2", privileged=False), "config.json", "Permission denied")


def test_command_says_so_when_the_current_folder_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    code = "import os; os.rmdir(os.getcwd()); from dlo_export.exporter.cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(tmp_path / "nothing")]
    result = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert result.returncode == MACHINE, result.stderr
    assert "the current folder: No such file" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_the_model_and_not_its_output_when_the_model_cannot_be_reached(tmp_path, command):
    (tmp_path / "secret").mkdir(mode=0o600)
    result = dlo(command, tmp_path / "secret" / "model", "-o", tmp_path / "out", privileged=False)
    assert result.returncode == MACHINE, result.stderr
    assert f"{tmp_path / 'secret' / 'model'}: Permission denied" in result.stderr


@pytest.mark.parametrize(
    "command",
    [("export", "--no-parity"), ("expand", "--every", "1"), ("expand", "--every", "1", "--adapter")],
    ids=" ".join,
)
def test_command_names_its_output_and_leaves_nothing_when_a_file_may_not_be_so_long(tmp_path, model, command):
    limits = {"file_bytes": 4096}
    result = dlo(command[0], model, "-o", tmp_path / "deep" / "out", *command[1:], limits=limits)
    assert result.returncode == MACHINE, result.stderr
    assert f"{tmp_path / 'deep' / 'out'}: cannot be written: File too large" in result.stderr
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo], ids=["file", "pipe"])
def test_train_refuses_its_run_folder_before_the_work_when_it_is_none(tmp_path, make):
    make(tmp_path / "out.run")
    train = ("train", tmp_path / "nothing", "--data", tmp_path, "-o", tmp_path / "out")
    check_refused(dlo(*train), "out.run: is no folder")


class DamagingReporter(Reporter):
    """Damages the weights just before parity is measured."""

    @contextlib.contextmanager
    def stage(self, name):
        if name == "parity":
            for file in self.folder.glob(".out.*/model.onnx.data"):
                file.write_bytes(bytes(reversed(file.read_bytes())))
        with super().stage(name):
            yield


def test_export_keeps_what_lies_in_its_failed_folder_when_parity_fails(tmp_path, model):
    shutil.copytree(model, tmp_path / "out.failed")
    before = digests(tmp_path / "out.failed")
    reporter = DamagingReporter()
    reporter.folder = tmp_path
    for _ in range(2):  # the second one replaces the first one's
        with pytest.raises(ParityFailedError) as caught:
            export_model(ExportRequest(str(model), tmp_path / "out"), reporter)
        assert caught.value.kept == tmp_path / "out.failed-2"
    assert digests(tmp_path / "out.failed") == before
    assert json.loads((caught.value.kept / "dlo_artifact.json").read_text())["parity"]["verdict"] == "FAIL"
    assert sorted(os.listdir(tmp_path)) == ["model", "out.failed", "out.failed-2"]


def test_failed_artefact_names_the_graphs_of_engines_when_parity_fails(tmp_path, model):
    reporter = DamagingReporter()
    reporter.folder = tmp_path
    trt = TensorRtRequest("rtx", ("sm89",), max_batch=1, max_sequence=8, max_cache=64, split=True)
    with pytest.raises(ParityFailedError) as caught:
        export_model(ExportRequest(str(model), tmp_path / "out", trt=trt), reporter)
    failed = caught.value.kept
    description = load_description(failed)
    verify_files(description.files)
    described = {str(file.name.relative_to(failed)) for file in description.files}
    found = {str(path.relative_to(failed)) for path in failed.rglob("*") if {".onnx", ".data"} & {path.suffix}}
    assert described == found > {"model.onnx", "engines/prefill.onnx", "engines/decode.onnx", "engines/model.onnx.data"}
    assert description.engines == ()


def test_command_replaces_nothing_of_another_kind_when_forced(tmp_path):
    model = save_tiny_llama(tmp_path / "model", layers=2, vocab=BYTE_VOCABULARY, tokenizer=True)
    (tmp_path / "text.txt").write_text("One text of some words. " * 400)
    calibrate = ("calibrate", model, "--tokens", "512", "--evaluation-tokens", "512", "--text", tmp_path / "text.txt")
    train = ("train", model, "--data", tmp_path / "text.txt", "--routers", "add", "--max-steps", "1")
    making = {
        "an artefact": ("export", model, "--no-parity"),
        "a checkpoint": ("expand", model, "--every", "1"),
        "an adapter": ("expand", model, "--every", "1", "--adapter"),
    }
    for kind, command in making.items():
        assert dlo(*command, "-o", tmp_path / kind).returncode == DONE
    before = digests(tmp_path)
    for new, command in (
        *making.items(),
        ("a checkpoint", calibrate),
        ("an adapter", (*calibrate, "--as-adapter")),
        ("an adapter", (*calibrate, "--adapter", tmp_path / "an adapter")),
        ("a trained checkpoint", train),
    ):
        for old in making.keys() - {new, new.replace("trained ", "")}:
            result = dlo(*command, "-o", tmp_path / old, "--force")
            check_refused(result, f"is {old}, which --force does not replace with {new}")
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("export", ""), "'model'"),
        (("export", "x", "-o", ""), "'--output'"),
        (("export", "x", "--adapter="), "'--adapter'"),
        (("export", "x", "--trt-plugin-library", ""), "'--trt-plugin-library'"),
        (("expand", "", "-o", "y"), "'model'"),
        (("calibrate", "x", "-o", "y", "--text", ""), "'--text'"),
        (("train", "x", "-o", "y", "--data", ""), "'--data'"),
        (("train", "x", "-o", "y", "--data", "z", "--held-out", ""), "'--held-out'"),
        (("run", "", "Hello"), "'artefact'"),
        (("bench", "x", ""), "'artefacts'"),
        (("inspect", ""), "'path'"),
        (("evaluate", "x", "--text", ""), "'--text'"),
        (("parity", "x", ""), "'model'"),
    ],
)
def test_command_refuses_an_empty_argument_by_its_name(arguments, name):
    check_refused(dlo(*arguments), name, "it is empty")


def test_run_takes_an_empty_prompt(tmp_path):
    check_refused(dlo("run", tmp_path, ""), "dlo_artifact.json")


def test_one_of_two_exports_is_refused_when_both_write_to_one_place(tmp_path, model):
    code = "from dlo_export.exporter.cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(model), "-o", str(tmp_path / "out"), "--no-parity"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(2)]
    for process in processes:
        process.communicate()
    assert sorted(process.returncode for process in processes) == [DONE, BAD_INPUT]
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_default_output_is_beside_the_model_when_its_path_has_no_name(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert default_output(".") == tmp_path / "model-dlo"
    assert default_output("..") == tmp_path.with_name(f"{tmp_path.name}-dlo")
    assert default_output("models/llama.gguf") == Path("llama-dlo")


def test_export_names_its_output_after_the_folder_when_it_is_the_current_one(tmp_path, model, monkeypatch):
    monkeypatch.chdir(model)
    assert dlo("export", ".", "--no-parity").returncode == DONE
    assert sorted(os.listdir(tmp_path)) == ["model", "model-dlo"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("export", "x", "--trt", "--trt-timeout", "-1"), "--trt-timeout"),
        (("export", "x", "--trt", "--trt-timeout", "nan"), "--trt-timeout"),
        (("export", "x", "--trt", "--trt-max-batch", "0"), "--trt-max-batch"),
        (("calibrate", "x", "-o", "y", "--layers", "a"), "--layers"),
        (("calibrate", "x", "-o", "y", "--target", "inf"), "--target"),
        (("calibrate", "x", "-o", "y", "--seed", "-1"), "--seed"),
        (("run", "x", "y", "--temperature", "nan"), "--temperature"),
        (("run", "x", "y", "-n", "99999999999"), "--max-new-tokens"),
        (("run", "x", "y", "--trt-plugin-library", "z"), "--trt-plugin-library"),
        (("run", "x", "y", "--seed", "-1"), "--seed"),
        (("run", "x", "y", "--threads", "100000"), "--threads"),
        (("expand", "x", "-o", "y", "--seed", "-1"), "--seed"),
        (("bench", "x", "--threads", "100000"), "--threads"),
        (("expand", "x"), "--output"),
    ],
)
def test_usage_errors_name_the_option(arguments, option):
    check_refused(dlo(*arguments), option)
