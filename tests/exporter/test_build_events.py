"""Events of a build travel whole, however the pipe cuts them."""

import os
import subprocess
import sys
import threading

from dlo_export.exporter.tensorrt.build_events import EventPipe, EventReader


def test_events_arrive_whole_when_the_pipe_cuts_them_anywhere():
    reading, writing = os.pipe()
    pipe = EventPipe(writing)
    long = "x" * 100_000  # more than a pipe holds
    sender = threading.Thread(target=lambda: [pipe.send("log", text=long, number=i) for i in range(3)])
    sender.start()
    reader, events = EventReader(), []
    while len(events) < 3:
        events += reader.feed(os.read(reading, 1000))
    sender.join()
    assert [event["number"] for event in events] == [0, 1, 2]
    assert all(event["text"] == long and event["event"] == "log" for event in events)
    os.close(reading)
    os.close(writing)


def test_stage_tells_of_its_end_only_when_it_succeeds():
    reading, writing = os.pipe()
    pipe = EventPipe(writing)
    with pipe.stage("parse"):
        pass
    try:
        with pipe.stage("build"):
            raise ZeroDivisionError
    except ZeroDivisionError:
        os.close(writing)
    events = list(EventReader().feed(os.read(reading, 1 << 16)))
    os.close(reading)
    assert [(event["event"], event["name"]) for event in events] == [
        ("stage_started", "parse"),
        ("stage_finished", "parse"),
        ("stage_started", "build"),
    ]
    assert events[1]["seconds"] >= 0


def test_peak_memory_counts_anew_after_a_reset():
    # In a process of its own: what else this one holds may be freed meanwhile.
    program = """
import numpy as np
from dlo_export.exporter.tensorrt.build_events import peak_memory, reset_peak_memory
np.ones(64 << 20, np.uint8)
reset_peak_memory()
before = peak_memory()
np.ones(96 << 20, np.uint8)
print(peak_memory() - before)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 90 << 20 < int(ended.stdout) < 150 << 20
