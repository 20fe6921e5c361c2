"""Signals at any moment of a command: the old output or the new one, whole, and the exit code that says so.

DLO_TEST_MOMENTS is how many moments of each command's run, and of a process's start, are tried with each signal. Runs
are forks of a process that has everything imported; 60 moments of all of them take some minutes of one core.
"""

import contextlib
import hashlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dlo_export.checkpoints.files.output_check import check_output_folder
from dlo_export.checkpoints.files.written_files import LIST_NAME
from dlo_export.exporter.exit_codes import DONE, INTERRUPTED, MACHINE, OUTPUT_LOST, TERMINATED
from tests.exporter import forked_commands
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

MOMENTS = int(os.environ.get("DLO_TEST_MOMENTS", "4"))
ENDINGS = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: TERMINATED,
    signal.SIGHUP: TERMINATED,
    signal.SIGKILL: -signal.SIGKILL,
}
START_SECONDS = 0.05
CODE = "from dlo_export.exporter.cli import main; main()"
# The new output differs from the old one; a text of few words makes calibration short.
COMMANDS = {
    "export": (("--no-parity",), ("--no-parity", "--lowering", "masked")),
    "expand": (("--every", "1"), ("--every", "2")),
    "calibrate": (("--tokens", "512", "--evaluation-tokens", "512", "--text", "{text}"), ("--target", "0.5")),
    "train": (
        ("--data", "{text}", "--routers", "add", "--sequence", "64", "--save-every", "2", "--max-steps", "2"),
        ("--max-steps", "5"),
    ),
}
ADDS_TO_OLD = ("calibrate", "train")


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def digests(folder):
    """Of every file but the list, which has times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LIST_NAME)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", params=COMMANDS)
def command(request, tmp_path_factory):
    """Arguments of a command but for its output, an old output, what the old and the new consist of, and seconds."""
    folder = tmp_path_factory.mktemp(request.param)
    routed = [True, False, True] if request.param == "export" else None
    model = save_tiny_llama(folder / "model", routed=routed, vocab=BYTE_VOCABULARY, tokenizer=True)
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"One text of some words, number {number}. " * 40)
    old, new = ([part.format(text=folder / "text") for part in given] for given in COMMANDS[request.param])
    if request.param in ADDS_TO_OLD:
        new = [*old, *new]
    for name, given in (("old", old), ("new", new)):
        process = forked_commands.start([request.param, model, "-o", folder / name, *given], folder / "messages")
        began = time.monotonic()  # of its work, as below
        process.join()
        seconds = time.monotonic() - began
        result = forked_commands.ended(process, folder / "messages")
        assert result.returncode == DONE, result.stderr
    made = [digests(folder / name) for name in ("old", "new")]
    assert made[0] != made[1]
    return [request.param, model, *new], folder / "old", made, seconds


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_command_leaves_old_or_new_when_a_signal_comes_at_any_moment(command, tmp_path, number, twice):
    if twice and number == signal.SIGKILL:
        pytest.skip("nobody is killed twice")
    arguments, old, made, seconds = command
    moments = -(-MOMENTS // 2) if arguments[0] == "train" else MOMENTS  # the slowest, whose moments are much alike
    for moment in range(moments):
        out, messages = tmp_path / str(moment) / "out", tmp_path / str(moment)
        shutil.copytree(old, out)
        process = forked_commands.start([*arguments, "-o", out, "--force"], messages)
        time.sleep(seconds * (moment + 0.5) / moments)
        for _ in range(1 + twice):
            # Between the end of a process and its parent's notice of it there is nobody to signal.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        process.join(60)
        said = f"moment {moment}: {forked_commands.ended(process, messages).stderr}"
        # Before the command has begun, a signal ends it as it ends any program.
        assert process.exitcode in (ENDINGS[number], -number, DONE), said
        assert "Traceback" not in said
        assert digests(out) in made, said
        if number == signal.SIGKILL:
            check_output_folder(out, overwrite=True)  # as the next command does first
        assert {*os.listdir(out.parent)} - ({"out.run"} if arguments[0] == "train" else set()) == {"out"}, said
        if arguments[0] == "train" and number == signal.SIGKILL and (out.parent / "out.run" / "training.json").exists():
            again = forked_commands.run(*arguments, "-o", out, "--force", "--resume")
            assert (again.returncode, digests(out)) == (DONE, made[1]), again.stderr


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact")
    process = start(["export", save_tiny_llama(folder / "model"), "-o", folder / "out", "--no-parity"])
    assert process.communicate()[1] == ""
    return folder / "out"


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_export_leaves_the_old_when_a_signal_comes_as_its_process_starts(tmp_path, artefact, number):
    """In a process of its own, whose first line says that Python has begun; what comes before is Python's alone."""
    out = tmp_path / "out"
    shutil.copytree(artefact, out)
    before = digests(out)
    command = [sys.executable, "-c", f"print('begun', flush=True); {CODE}"]
    for moment in range(MOMENTS):
        process = subprocess.Popen(
            [*command, "export", artefact.with_name("model"), "-o", out, "--force"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(START_SECONDS * (moment + 0.5) / MOMENTS)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if stdout:
            assert process.returncode in (ENDINGS[number], -number), stderr
        assert digests(out) == before
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("module", ["typer", "onnx_ir", "dlo_export.exporter.exit_codes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_export_ends_quietly_when_a_signal_comes_during_imports(tmp_path, module, number):
    hook = f"""
import signal, sys
class Raise:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Raise())
"""
    process = subprocess.run(
        [sys.executable, "-c", hook + CODE, "export", str(tmp_path), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == ENDINGS[number], process.stderr
    assert process.stderr in ("", "error: interrupted\n")


def test_export_ends_quietly_when_a_signal_comes_in_a_finalizer(tmp_path):
    code = f"""
import signal, sys
class Raise:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
class Finalize:
    def find_spec(self, name, path=None, target=None):
        if name == "onnx_ir":
            Raise()
            import time; time.sleep(60)
sys.meta_path.insert(0, Finalize())
{CODE}
"""
    command = [sys.executable, "-c", code, "export", str(tmp_path), "-o", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert process.returncode == TERMINATED
    assert process.stderr == "error: interrupted\n"


def test_export_goes_on_when_its_shell_ignores_hang_ups(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    code = f"import os, signal; os.kill(os.getpid(), signal.SIGHUP); {CODE}"
    process = subprocess.run(
        ["nohup", sys.executable, "-c", code, "export", str(model), "-o", str(tmp_path / "out"), "--no-parity"],
        capture_output=True,
        check=False,
    )
    assert process.returncode == DONE


@pytest.mark.parametrize("init", ["copy", "zero_out", "mean"])
def test_expand_says_so_when_its_model_is_cut_short_while_it_is_read(tmp_path, init):
    model = save_tiny_llama(tmp_path / "model", hidden=64, layers=4)
    file = model / "model.safetensors"
    # Cut before the first bytes of the output are written: what is mapped is no longer there. By what is written or
    # computed first, the system says so in one way or in the other.
    code = f"""
import os, pathlib
from dlo_export.checkpoints import checkpoint_folder
save = checkpoint_folder.save_model_tensors
def cut(*arguments, **options):
    os.truncate({str(file)!r}, 8192)
    save(*arguments, **options)
checkpoint_folder.save_model_tensors = cut
"""
    process = subprocess.run(
        [sys.executable, "-c", code + CODE, "expand", str(model), "-o", str(tmp_path / "out"), "--every", "1"]
        + (["--source", "mean"] if init == "mean" else ["--init", init]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == MACHINE, process.stderr
    assert "has become shorter" in process.stderr
    assert "hint:" in process.stderr
    check_output_folder(tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("redirection", "codes"),
    [
        ("| true", (DONE, OUTPUT_LOST)),
        ("--json | true", (DONE, OUTPUT_LOST)),
        ("--json >/dev/full", (OUTPUT_LOST,)),
        ("| head -n 1 >/dev/null", (DONE, OUTPUT_LOST)),
        (">/dev/full", (OUTPUT_LOST,)),
        (">&-", (DONE,)),
        ("2>/dev/full", (DONE,)),
        ("2>&-", (DONE,)),
        (">&- 2>&- <&-", (DONE,)),
        (">/dev/full 2>/dev/full", (OUTPUT_LOST,)),
    ],
)
def test_inspect_is_quiet_when_its_output_is_closed_or_full(artefact, redirection, codes):
    command = f"{sys.executable} -c '{CODE}' inspect {artefact} {redirection}"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode in codes
    assert result.stderr == ""


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_errors_keep_their_code_when_nobody_can_read_them(tmp_path, redirection):
    command = f"{sys.executable} -c '{CODE}' inspect {tmp_path} {redirection}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert result.returncode == 2


def test_export_writes_nothing_of_its_messages_into_files_when_streams_are_closed(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    command = f"{sys.executable} -c '{CODE}' export {model} -o {{}} --no-parity -v {{}}"
    for name, redirection in (("whole", ""), ("closed", ">&- 2>&- <&-")):
        subprocess.run(["bash", "-c", command.format(tmp_path / name, redirection)], capture_output=True, check=True)
    assert digests(tmp_path / "whole") == digests(tmp_path / "closed")


def test_export_leaves_nothing_when_its_terminal_is_closed(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CODE, "export", str(model), "-o", str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/model.onnx")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == TERMINATED
    assert os.listdir(tmp_path) == ["model"]
