import os
import signal
import threading

import pytest

from dlo_export.checkpoints.files.uninterrupted import SIGNALS, uninterrupted


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_acts_after_the_block_when_it_comes_within(number):
    steps = []
    before = signal.signal(number, lambda *_: steps.append("signal"))
    try:
        with uninterrupted():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            steps.append("block")
        assert steps == ["block", "signal"]
        os.kill(os.getpid(), number)
        assert steps == ["block", "signal", "signal"]
    finally:
        signal.signal(number, before)


def test_signal_stays_ignored_when_it_was_before():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_left_alone_when_another_thread_runs_the_block():
    found = []

    def run():
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
