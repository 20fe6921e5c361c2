"""Peers that cannot be installed."""

from __future__ import annotations

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
