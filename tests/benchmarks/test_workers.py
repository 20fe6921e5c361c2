"""What is measured in turn has the machine to itself."""

from pathlib import Path

from benchmarks.common.workers import WAIT_POLICY, Worker, alternate_workers, launch_workers_in_turn


def test_no_other_candidate_is_alive_when_one_starts():
    started = []

    def start(name):
        assert not [process for _, process in started if Path(f"/proc/{process}").exists()]
        worker = Worker("tests.benchmarks.idle_worker")
        started.append((name, worker.facts["process"]))
        return worker

    times = launch_workers_in_turn(
        {name: lambda name=name: start(name) for name in "ab"}, launches=2, runs=3, settle=1, busy=True
    )
    assert [name for name, _ in started] == ["a", "b", "b", "a"]
    assert {name: len(samples.values) for name, samples in times.items()} == {"a": 2, "b": 2}


def test_every_candidate_starts_first_once_when_there_are_as_many_launches():
    started = []

    def start(name):
        started.append(name)
        return Worker("tests.benchmarks.idle_worker")

    candidates = {name: lambda name=name: start(name) for name in "abc"}
    alternate_workers(candidates, launches=3, blocks=1, runs=1, settle=0, busy=True)
    assert "".join(started) == "abcbcacab"


def test_candidate_chooses_how_its_threads_wait(monkeypatch):
    monkeypatch.setenv(WAIT_POLICY, "PASSIVE")  # as importing our runtimes does
    with Worker("tests.benchmarks.idle_worker") as worker:
        told = Path(f"/proc/{worker.facts['process']}/environ").read_bytes()
    assert WAIT_POLICY.encode() not in told


def test_worker_finds_a_file_that_was_named_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Worker("tests.benchmarks.idle_worker", Path("model.onnx"), "--threads", "2") as worker:
        told = Path(f"/proc/{worker.facts['process']}/cmdline").read_text().split("\0")
    assert told[-4:-1] == [str(tmp_path / "model.onnx"), "--threads", "2"]
