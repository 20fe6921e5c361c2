"""The commands as a user runs them: exit codes, messages, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from dlo_export import __version__
from dlo_export.exporter.app import app, app_for
from dlo_export.exporter.exit_codes import BAD_INPUT, MACHINE, OUR_BUG, exit_code, report_error
from tests.exporter.forked_commands import run as dlo
from tests.tiny_models import save_tiny_llama

REFERENCE = Path(__file__).parents[1] / "data" / "reference_mlp_routed"


def check_refused(result, folder, *words):
    """Bad input: code 2, every word named, no traceback, nothing left in the folder but what was there."""
    assert result.returncode == BAD_INPUT, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert "hint:" in result.stderr
    assert not [path.name for path in folder.iterdir() if "out" in path.name], "a partial artefact was left"


@pytest.fixture
def checkpoint(tmp_path):
    return save_tiny_llama(tmp_path / "model")


def test_export_writes_a_self_describing_artefact_when_the_model_is_routed(tmp_path):
    result = dlo("export", REFERENCE, "-o", tmp_path / "out", "--json", "--no-parity")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "not a terminal: no progress"
    description = json.loads(result.stdout)
    assert description == json.loads((tmp_path / "out" / "dlo_artifact.json").read_text())
    assert [layer["routed"] for layer in description["layers"]] == [True, True, False, True]
    assert description["lowering"] == "compact"
    assert description["parity"] == {"verdict": "NOT RUN", "reason": "--no-parity"}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "model.onnx.data", "config.json"}


def test_parity_ends_with_4_when_it_cannot_run(tmp_path):
    artefact = tmp_path / "bf16"
    assert dlo("export", REFERENCE, "-o", artefact, "--dtype", "bf16", "--no-parity").returncode == 0
    for options in ((), ("--by-layer",)):
        result = dlo("parity", artefact, REFERENCE, *options)
        assert result.returncode == MACHINE, result.stderr
        assert "parity NOT RUN: ONNX Runtime's CPU provider does not implement bfloat16" in result.stdout


def test_export_passes_parity_when_nothing_is_said_about_it(tmp_path):
    result = dlo("export", REFERENCE, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "parity PASS" in result.stdout
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["verdict"] == "PASS"


def test_export_refuses_an_existing_folder_unless_forced(checkpoint, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    for force in ((), ("--force",)):
        result = dlo("export", checkpoint, "-o", tmp_path / "kept", "--no-parity", *force)
        check_refused(result, tmp_path, "kept")
        assert (tmp_path / "kept" / "file").read_text() == "mine"
    (tmp_path / "kept" / "file").unlink()
    assert dlo("export", checkpoint, "-o", tmp_path / "kept", "--no-parity").returncode == 0
    assert dlo("export", checkpoint, "-o", tmp_path / "kept", "--no-parity").returncode == BAD_INPUT
    assert dlo("export", checkpoint, "-o", tmp_path / "kept", "--no-parity", "--force").returncode == 0


def test_export_leaves_weights_out_when_asked_to(checkpoint, tmp_path):
    assert dlo("export", checkpoint, "-o", tmp_path / "out", "--no-weights").returncode == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert not (tmp_path / "out" / "model.onnx.data").exists()


def test_export_names_the_file_when_safetensors_are_truncated(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_refused(dlo("export", checkpoint, "-o", tmp_path / "out"), tmp_path, "model.safetensors")


def test_export_names_the_file_when_the_header_is_corrupt(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"\x10" + b"\0" * 7 + b"{this is no JSON" + file.read_bytes())
    check_refused(dlo("export", checkpoint, "-o", tmp_path / "out"), tmp_path, "model.safetensors")


def test_export_names_tensors_when_shapes_are_wrong(checkpoint, tmp_path):
    values = json.loads((checkpoint / "config.json").read_text())
    values["intermediate_size"] += 8
    (checkpoint / "config.json").write_text(json.dumps(values))
    check_refused(dlo("export", checkpoint, "-o", tmp_path / "out"), tmp_path, "model.layers.0.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "gemma3"), ("hidden_act", "gelu"), ("rope_scaling", {"rope_type": "yarn"})]
)
def test_export_names_the_field_when_the_configuration_is_unsupported(tmp_path, key, value):
    checkpoint = save_tiny_llama(tmp_path / "model", legacy_keys=True)
    values = json.loads((checkpoint / "config.json").read_text())
    values[key] = value
    (checkpoint / "config.json").write_text(json.dumps(values))
    check_refused(dlo("export", checkpoint, "-o", tmp_path / "out"), tmp_path, key, "config.json")


def test_export_refuses_a_lowering_when_nothing_is_routed(checkpoint, tmp_path):
    result = dlo("export", checkpoint, "-o", tmp_path / "out", "--lowering", "compact")
    check_refused(result, tmp_path, "no routers")


@pytest.mark.parametrize("options", [[], ["--trt"]], ids=["model.onnx", "engines"])
def test_export_refuses_to_leave_routers_unlowered_as_if_there_were_none(tmp_path, options):
    checkpoint = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    result = dlo("export", checkpoint, "-o", tmp_path / "out", "--lowering", "none", *options)
    check_refused(result, tmp_path, "--lowering none: is unknown", "masked")


def test_export_refuses_a_graph_when_no_adapter_is_given(tmp_path):
    graph = Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx"
    check_refused(dlo("export", graph, "-o", tmp_path / "out"), tmp_path, "--adapter")


def test_export_says_so_when_there_is_no_such_model(tmp_path):
    result = dlo("export", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert result.returncode == BAD_INPUT
    assert "nowhere" in result.stderr


def test_usage_errors_end_with_bad_input():
    assert dlo("export").returncode == BAD_INPUT
    assert dlo("export", "x", "--dtype", "int3").returncode == BAD_INPUT
    assert dlo("no-such-command").returncode == BAD_INPUT


def test_export_says_so_when_the_disk_is_full(checkpoint, tmp_path):
    """A file system of 64 kB, where one can be mounted."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        result = dlo("export", checkpoint, "-o", mount / "out", "--no-parity")
        assert result.returncode == MACHINE, result.stderr
        assert "hint:" in result.stderr
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_exit_code_is_the_machines_when_a_gpu_is_full(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand much more")
    assert exit_code(error) == MACHINE
    report_error(error)
    said = capsys.readouterr().err
    assert "Tried to allocate 20.00 GiB" in said
    assert "much more" not in said
    assert said.count("hint:") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"), "illegal memory access"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "ALLOC_FAILED"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), "no NVIDIA driver"),
    ],
)
def test_exit_code_is_the_machines_when_a_gpu_fails(capsys, error, said):
    assert exit_code(error) == MACHINE
    report_error(error)
    assert said in (printed := capsys.readouterr().err)
    assert printed.count("hint:") == 1


def test_exit_code_is_the_machines_when_pytorch_finds_no_memory_on_a_cpu(capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert exit_code(caught.value) == MACHINE
    report_error(caught.value)
    assert "can't allocate memory: you tried to allocate 4000000000000000 bytes" in capsys.readouterr().err
    assert exit_code(RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)")) == OUR_BUG


def test_exit_codes_tell_bugs_from_the_machines_and_the_users_faults():
    assert exit_code(KeyError("x")) == OUR_BUG
    assert exit_code(ValueError("of somebody else's library")) == OUR_BUG
    assert exit_code(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == MACHINE
    assert exit_code(ModuleNotFoundError(name="torch")) == MACHINE
    assert exit_code(ModuleNotFoundError(name="dlo_export.graph_passes.gone")) == OUR_BUG


def test_every_command_takes_the_option_that_the_message_of_a_bug_names(capsys):
    report_error(KeyError("x"))
    assert "run again with -v" in capsys.readouterr().err
    commands = typer.main.get_command(app).commands
    options = {name: {word for option in command.params for word in option.opts} for name, command in commands.items()}
    assert {name for name, words in options.items() if "-v" not in words} == set()


def test_commands_load_no_heavy_library_when_their_options_are_listed():
    code = (
        "import sys, dlo_export.exporter.app; "
        "print(*sorted({'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not loaded.split()


def test_version_is_printed_when_no_command_is_given():
    result = dlo("--version")
    assert (result.returncode, result.stdout) == (0, f"dlo-export {__version__}\n")


def test_options_are_made_of_the_command_alone_that_is_asked_for():
    for command in app.registered_commands:
        assert app_for([command.name, "--help"]).registered_commands == [command]
    for arguments in ([], ["--help"], ["--version"], ["nothing"]):
        assert len(app_for(arguments).registered_commands) == len(app.registered_commands) == 9
