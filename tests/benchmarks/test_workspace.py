"""Where benchmarks keep what they make."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import workspace
from benchmarks.common.workspace import REPOSITORY, kept, temporary_folder


def test_temporary_folder_makes_the_workspace_of_a_fresh_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "WORKSPACE", tmp_path / ".peers")
    with temporary_folder() as folder:
        assert folder.parent == tmp_path / ".peers"
        (folder / "graph").mkdir()
    assert list((tmp_path / ".peers").iterdir()) == []


def test_nobody_makes_a_temporary_folder_of_the_workspace_in_another_way() -> None:
    # A constant's name after `dir=`: WORKSPACE, or a folder in it, which a fresh clone does not have.
    files = [path for room in ("benchmarks", "tests/interop") for path in (REPOSITORY / room).rglob("*.py")]
    found = [path for path in files if re.search(r"\bdir=[A-Z]", path.read_text())]
    assert found == [REPOSITORY / "benchmarks" / "common" / "workspace.py"]


def test_what_is_kept_is_made_once_when_it_is_asked_for_again(tmp_path: Path) -> None:
    asked: list[Path] = []

    def make(folder: Path) -> dict[str, Any]:
        asked.append(folder)
        return {"graph": folder / "model.onnx", "rates": [0.5]}

    found = [kept(tmp_path / "new" / "folder", ["smollm2", 2], make) for _ in range(2)]
    assert asked == [tmp_path / "new" / "folder"]
    assert found == [{"graph": str(asked[0] / "model.onnx"), "rates": [0.5]}] * 2


def test_what_is_kept_is_made_once_when_two_ask_for_it_at_once(tmp_path: Path) -> None:
    began, asked = threading.Barrier(2), []

    def make(folder: Path) -> str:
        asked.append(folder)
        time.sleep(0.2)  # in which the other would begin
        return "made"

    def ask() -> str:
        began.wait()
        return str(kept(tmp_path, "smollm2", make))

    with ThreadPoolExecutor(2) as threads:
        found = [each.result() for each in [threads.submit(ask) for _ in range(2)]]
    assert (found, len(asked)) == (["made", "made"], 1)


def test_folder_is_refused_when_it_was_made_for_something_else(tmp_path: Path) -> None:
    kept(tmp_path, ["smollm2"], str)
    with pytest.raises(RuntimeError, match=r"was made for \['smollm2'\], not \['h2048'\]"):
        kept(tmp_path, ["h2048"], str)
