"""Results on disk: one JSON file per piece of work, so that a run that is there is never repeated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_file import finite, read_json, save_json

_DESCRIPTION = "reproduction.json"
_LEFT_OUT = "left-out"


class Results:
    """The output folder.

    runs/{name}.json    a piece of work that is done
    left-out/{name}.json    why one is not
    models/{name}/      what later pieces need of it
    text/               what is trained on and measured on
    tokens/             the chats of it, in tokens
    routers/            calibrated ones that runs start from
    reproduction.json   what all of it was run with

    Args:
        folder: Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text"
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def begin(self, definition: Mapping[str, Any]) -> None:
        """Says what all results are run with, or checks that those that are there were run with the same.

        Args:
            definition: Name and value.

        Raises:
            InputError: Those that are there were run with something else.
        """
        file = self.folder / _DESCRIPTION
        if not file.exists():
            self._save(file, definition)
            return
        before, now = read_json(file), finite(dict(definition))
        if different := [key for key in now if before.get(key) != _as_json(now[key])]:
            shown = "; ".join(f"{key} is {now[key]!r}, was {before.get(key)!r}" for key in different)
            raise InputError(
                f"{self.folder}: holds results that were run otherwise: {shown}",
                hint="give another --output, or what these were run with",
            )

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def __getitem__(self, name: str) -> dict[str, Any]:
        return read_json(self._file(name))

    def save(self, name: str, values: Mapping[str, Any]) -> None:
        """Keeps a result, whole or not at all."""
        self._save(self._file(name), values)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Keeps why pieces are missing, by their names: another process may write the tables."""
        (self.folder / _LEFT_OUT).mkdir(exist_ok=True)
        for name, reason in reasons.items():
            self._save(self.folder / _LEFT_OUT / f"{name}.json", {"reason": reason})

    @property
    def left_out(self) -> dict[str, str]:
        """Why pieces are missing, of those that were not done since."""
        files = sorted((self.folder / _LEFT_OUT).glob("*.json"))
        return {file.stem: read_json(file)["reason"] for file in files if file.stem not in self}

    def found(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The results whose names begin so, by the rest of their names."""
        files = sorted((self.folder / "runs").glob(f"{prefix}*.json"))
        return {file.stem.removeprefix(prefix): read_json(file) for file in files}

    def model(self, name: str) -> Path:
        """Where a model is or will be."""
        return self.folder / "models" / name

    def remove_model(self, name: str) -> None:
        """Makes room where no piece needs a model any more; one that diverged was never there."""
        if self.model(name).exists():
            shutil.rmtree(self.model(name))

    def _file(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}.json"

    def _save(self, file: Path, values: Mapping[str, Any]) -> None:
        partial = file.with_suffix(f".partial-{os.getpid()}")  # several processes may share a folder
        save_json(partial, finite(dict(values)))
        os.replace(partial, file)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
