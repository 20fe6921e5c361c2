"""Signals that stop a command, in processes that get them."""

import signal
import subprocess
import sys

import pytest

CODE = """
import signal, time
from dlo_export.exporter.stop_signals import StopSignals
stop = StopSignals()
{before}
try:
    with stop.raised():
        print("ready", flush=True)
        {inside}
except KeyboardInterrupt:
    print("cleaned up")
print(stop.exit_code)
"""


def run(before="", inside="time.sleep(30)", send=(), prefix=()):
    code = CODE.format(before=before, inside=inside)
    process = subprocess.Popen([*prefix, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n" if send else True
    for number in send:
        process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    return output.split()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_first_signal_ends_the_block_and_gives_the_exit_code(number, code):
    assert run(send=[number]) == ["cleaned", "up", str(code)]


def test_signal_is_raised_in_the_block_when_it_came_before():
    output = run(before="signal.raise_signal(signal.SIGTERM)", inside="raise AssertionError('the block ran')")
    assert output == ["cleaned", "up", "143"]


def test_signal_is_noted_alone_when_it_comes_after_the_block():
    assert run(inside="pass; atexit = 1\nsignal.raise_signal(signal.SIGINT)".replace("\n", "\n        ")) == [
        "ready",
        "cleaned",
        "up",
        "130",
    ]


def test_ignored_signal_stays_ignored():
    code = "signal.raise_signal(signal.SIGHUP); print('still here', flush=True)"
    assert run(inside=code, prefix=["nohup"]) == ["ready", "still", "here", "None"]


def test_signal_is_raised_again_when_python_had_to_drop_it():
    inside = """
        class Dropped:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)
        dropped = Dropped()
        del dropped
        time.sleep(30)"""
    assert run(inside=inside.lstrip(), send=()) == ["ready", "cleaned", "up", "130"]
