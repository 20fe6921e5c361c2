"""Peers that cannot be installed, or that several processes install at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import peers, workspace
from benchmarks.common.peers import is_installed, peer_environment
from dlo_export.checkpoints.errors import MachineError


def test_peer_that_cannot_be_installed_is_named_and_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in (workspace, peers):
        monkeypatch.setattr(module, "WORKSPACE", tmp_path / ".peers")
    requirements = tmp_path / "requirements-nobody.txt"
    requirements.write_text("nobody @ file:///nowhere/nobody.whl\n")
    with pytest.raises(MachineError, match=r"nobody cannot be installed.*\n\nhint: .*pip install") as raised:
        peer_environment("nobody", requirements)
    assert raised.value.exit_code == 4
    assert "nobody.whl" in capfd.readouterr().err  # pip says why
    assert not is_installed("nobody", requirements)
    assert [path.name for path in (tmp_path / ".peers").iterdir()] == ["nobody"]


def test_peer_is_installed_once_when_several_processes_ask_for_it(tmp_path: Path) -> None:
    requirements, folder = tmp_path / "requirements-nothing.txt", tmp_path / ".peers" / "nothing"
    requirements.write_text("--no-index\npip\n")  # which is there already
    program = (
        "from pathlib import Path; from benchmarks.common import peers, workspace\n"
        f"peers.WORKSPACE = workspace.WORKSPACE = Path({str(folder.parent)!r})\n"
        f"print(peers.peer_environment('nothing', Path({str(requirements)!r})))"
    )
    with workspace.alone_in(folder):
        asking = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=workspace.REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        told = [process.stderr.readline() for process in asking if process.stderr is not None]
        assert told == [f"waiting for another process that writes to {folder}\n"] * 2
        assert list(folder.iterdir()) == []
    ended = [process.communicate(timeout=300) for process in asking]
    assert [process.returncode for process in asking] == [0, 0], ended
    assert sorted(stderr for _, stderr in ended) == ["", f"installing nothing into {folder}\n"]
    assert [stdout for stdout, _ in ended] == [f"{folder / 'bin'}\n"] * 2
    assert (folder / "bin" / "pip").is_file()
