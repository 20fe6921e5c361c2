"""What benchmarks keep in folders of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.workspace import kept


def test_what_is_kept_is_made_once_when_it_is_asked_for_again(tmp_path: Path) -> None:
    asked: list[Path] = []

    def make(folder: Path) -> dict[str, Any]:
        asked.append(folder)
        return {"graph": folder / "model.onnx", "rates": [0.5]}

    found = [kept(tmp_path / "new" / "folder", ["smollm2", 2], make) for _ in range(2)]
    assert asked == [tmp_path / "new" / "folder"]
    assert found == [{"graph": str(asked[0] / "model.onnx"), "rates": [0.5]}] * 2


def test_folder_is_refused_when_it_was_made_for_something_else(tmp_path: Path) -> None:
    kept(tmp_path, ["smollm2"], str)
    with pytest.raises(RuntimeError, match=r"was made for \['smollm2'\], not \['h2048'\]"):
        kept(tmp_path, ["h2048"], str)
