"""Damaged inputs of every kind: refused with a message, or taken, and nothing else happens.

DLO_TEST_FUZZ_CASES is how many cases of each kind are tried, DLO_TEST_FUZZ_SEED where they begin.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import shutil
import signal
import stat
import time
from random import Random

import pytest

from dlo_export.checkpoints.files.output_check import check_output_folder
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE, MACHINE, PARITY_FAILED
from dlo_export.runtimes.artefact.description import FILE_NAME
from tests.exporter import forked_commands
from tests.fuzz.commands import KINDS, command, save_originals, vouch_for
from tests.fuzz.mutations import damage_place

CASES = int(os.environ.get("DLO_TEST_FUZZ_CASES", "30"))
FIRST_SEED = int(os.environ.get("DLO_TEST_FUZZ_SEED", "0"))
# No command may hang for 20 s: neither compute so long, nor be blocked so long, on whatever it waits for. Time in which
# it waits for a core counts as neither: that is the machine's load, and no fault of the command's.
HANGING_SECONDS = 20
# Of a process: far above what any of these tiny models takes, far below what a test machine has.
LIMITS = {"cpu_seconds": HANGING_SECONDS, "memory_bytes": 12 * 2**30, "file_bytes": 64 * 2**20}
SCREEN_ROWS = 40


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    save_originals(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_commands_refuse_or_take_an_input_and_touch_nothing_else_when_it_is_damaged(kind, originals, tmp_path):
    failures, codes = [], set()
    for seed in range(FIRST_SEED, FIRST_SEED + CASES):
        folder = tmp_path / str(seed)
        arguments, said, code, problems = run_case(kind, seed, originals, folder)
        codes.add(code)
        if problems:
            failures.append(f"seed {seed}, kept in {folder}: {said}\n  dlo {' '.join(arguments)}\n  {problems}")
        else:
            shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
    # Commands that are wrong in themselves, and damages that harm nothing, would show nothing.
    assert {DONE, BAD_INPUT} <= codes


def compute():
    end = time.process_time() + 1
    while time.process_time() < end:
        pass


def be_stopped():
    """Stops, until a process of its own lets it go on a second later."""
    if not os.fork():
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("work", "code"),
    [(compute, 0), (be_stopped, 0), (functools.partial(time.sleep, 60), -signal.SIGKILL)],
    ids=["computing", "stopped", "sleeping"],
)
def test_process_is_ended_when_it_is_blocked_and_not_when_it_works(work, code):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    forked_commands.join_unless_blocked(process, 0.5)
    assert process.exitcode == code


def run_case(kind, seed, originals, folder):
    """Damages copies in a new folder and runs a command on them.

    Returns:
        The command's arguments, what was damaged, the exit code, and what went wrong: an empty list where nothing did.
    """
    random = Random(f"{kind} {seed}")
    names, choices = KINDS[kind]
    for name in names:
        shutil.copytree(originals / name, folder / "case" / name)
    (folder / "case" / "out").mkdir()
    damaged, damage = random.choice(choices)
    said = f"{damaged}: {damage(random, folder / 'case' / damaged)}"
    if damage is not damage_place and random.random() < 0.7:
        vouch_for(folder / "case" / damaged)
    arguments = command(random, damaged)
    before = snapshot(folder / "case")
    result = run(arguments, folder)
    out = folder / "case" / "out"
    problems = [*result_problems(result), *output_problems(arguments, result, out)]
    if snapshot(folder / "case", but=out) != before:
        problems.append("something outside the output was changed")
    if arguments[0] == "export" and result.returncode == DONE:
        problems += artefact_problems(folder)
    return arguments, said, result.returncode, problems


def run(arguments, folder):
    """Runs a command in the folder of a case; a negative exit code is the signal that ended it."""
    messages = folder / "messages"
    process = forked_commands.start(arguments, messages, working_folder=folder / "case", limits=LIMITS)
    forked_commands.join_unless_blocked(process, HANGING_SECONDS)
    return forked_commands.ended(process, messages)


def result_problems(result):
    if result.returncode not in (DONE, PARITY_FAILED, BAD_INPUT, MACHINE):
        yield f"ended with {result.returncode}: {result.stderr[-3000:]}"
    if "Traceback" in result.stderr:
        yield f"a traceback: {result.stderr[-3000:]}"
    if result.returncode in (BAD_INPUT, MACHINE) and not ("error: " in result.stderr and "\nhint: " in result.stderr):
        yield f"no hint: {result.stderr[-3000:]}"
    rows = sum(max(1, -(-len(line) // 80)) for line in result.stderr.splitlines())
    if rows > SCREEN_ROWS:
        yield f"{rows} rows of messages: {result.stderr[:500]} … {result.stderr[-500:]}"
    if controls := {letter for letter in result.stdout + result.stderr if ord(letter) < 32 and letter not in "\n\r\t"}:
        yield f"control characters: {controls}"


def output_problems(arguments, result, out):
    """Whole or absent, whatever the command."""
    made = sorted(path.name for path in out.iterdir())
    expected = {DONE: [["new"]], PARITY_FAILED: [["new.failed"]]}.get(result.returncode, [[]])
    if arguments[0] not in ("export", "expand", "calibrate"):
        expected = [[]]
    if made not in expected:
        yield f"left {made} after exit code {result.returncode}"
    for name in made:
        check_output_folder(out / name, overwrite=True)  # raises where it is not a whole one of ours


def artefact_problems(folder):
    """What was exported can be opened by what opens artefacts."""
    inspected = run(["inspect", "out/new", "--json"], folder)
    if inspected.returncode != DONE:
        yield f"the artefact cannot be inspected: {inspected.stderr}"
    benched = run(["run", "out/new", "x", "-n", "1", "--raw"], folder)
    if "cannot load it" in benched.stderr or FILE_NAME in benched.stderr:
        yield f"the artefact cannot be run: {benched.stderr}"


def snapshot(folder, but=None):
    """Kinds, names and contents of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if but is not None and path.is_relative_to(but) and path != but:
            continue
        mode = path.lstat().st_mode
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(mode) else b""
        found[path] = (mode, hashlib.sha256(os.fsencode(content)).digest())
    return found
