"""Builds side by side, as memory allows."""

import dataclasses
import os
import signal

import pytest

from dlo_export.checkpoints.errors import EngineBuildError
from dlo_export.exporter.tensorrt.build_queue import Planned, expected_memory, run_builds
from tests.exporter.tiny_engines import save_request


@pytest.fixture
def asked(tmp_path):
    requests = []
    for name in ("first", "second"):
        (tmp_path / name / "engines").mkdir(parents=True)
        requests.append(save_request(tmp_path / name, "none"))
    return requests


def spans(asked, memory, **limits):
    """Runs builds; what happened in which order, by position of the build."""
    order = []

    def listener(position):
        def listen(event):
            if event["event"] in ("started", "result"):
                order.append((event["event"], position))

        return listen

    run_builds([Planned(each, None, memory, listener(i)) for i, each in enumerate(asked)], **limits)
    return order


def test_run_builds_takes_one_after_the_other_when_memory_is_short(asked):
    one_by_one = [(event, position) for position in range(2) for event in ("started", "result")]
    assert spans(asked, 100, jobs=2, memory_limit=150) == one_by_one
    assert spans(asked, 200, jobs=2, memory_limit=150) == one_by_one, "what fits nowhere runs alone"


def test_run_builds_takes_one_after_the_other_when_one_job_is_allowed(asked):
    assert spans(asked, 1, jobs=1)[:2] == [("started", 0), ("result", 0)]


def test_run_builds_runs_side_by_side_when_memory_allows(asked):
    """Each of two builds waits, stopped, until the other has started: neither could end if they ran in turn."""
    workers = {}

    def listener(position):
        def listen(event):
            if event["event"] == "started":
                workers[position] = event["process_id"]
                if len(workers) == 1:
                    os.kill(event["process_id"], signal.SIGSTOP)
                else:
                    os.kill(workers[1 - position], signal.SIGCONT)

        return listen

    built = run_builds(
        [Planned(each, None, 100, listener(i)) for i, each in enumerate(asked)], jobs=2, memory_limit=200
    )
    assert [result["bytes"] for _, result in built] == [each.output.stat().st_size for each in asked]


def test_run_builds_kills_the_others_when_one_fails(asked, tmp_path):
    asked[1] = dataclasses.replace(asked[1], profiles=())
    workers = {}

    def listener(position):
        def stop(event):
            """The first build for good, the second until the first has started."""
            if event["event"] == "started":
                workers[position] = event["process_id"]
                os.kill(event["process_id"], signal.SIGSTOP)
                if len(workers) == 2:
                    os.kill(workers[1], signal.SIGCONT)

        return stop

    with pytest.raises(EngineBuildError, match="no optimization profile"):
        run_builds([Planned(each, None, 1, listener(i)) for i, each in enumerate(asked)], jobs=2, memory_limit=10)
    with pytest.raises(ProcessLookupError):
        os.kill(workers[0], 0)
    assert not list(tmp_path.rglob("*.engine"))
    assert not list(tmp_path.rglob("*.partial"))


def test_expected_memory_grows_with_weights():
    assert expected_memory(0) > 0
    assert expected_memory(2 * 10**9) > expected_memory(10**9) > 2 * 10**9
