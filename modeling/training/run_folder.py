"""The folder a training run lives in until its model is written: settings, checkpoints, the log.

training.json       what the run depends on: settings, versions, hashes of model and data
log.jsonl           a line per step and per evaluation
checkpoint-{step}/  weights, optimiser, learning rates, random states, capacities; each whole or not there
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import MachineError
from dlo_export.checkpoints.files.json_file import finite, read_json, save_json
from dlo_export.checkpoints.files.written_files import (
    RUN_FILE,
    TRAINING_FILE,
    damaged_files,
    is_ours,
    remove_written_files,
    unfamiliar_files,
)
from dlo_export.modeling.training.errors import TrainingError

DESCRIPTION_NAME, LOG_NAME, CAPACITIES_NAME = TRAINING_FILE, "log.jsonl", RUN_FILE
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KEPT = 2
# What a run may not change without becoming another run.
_DEFINING = ("settings", "model", "data")


class RunFolder:
    """A run's folder.

    Args:
        path: Of the folder; made by `begin`.
        resumable: Whether checkpoints are written, to go on from.
    """

    def __init__(self, path: Path, *, resumable: bool = True) -> None:
        self.path, self.resumable = path, resumable

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.path / f"checkpoint-{step}"

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; None where there is none."""
        return next(iter(self._checkpoints()), None)

    def checkpoint_to_resume(self) -> Path | None:
        """The newest checkpoint; None where there is none, and the run begins anew.

        Raises:
            TrainingError: Something of it is gone or was cut short: what is loaded instead would be another run.
        """
        last = self.last_checkpoint()
        if last is not None and (damaged := damaged_files(last)):
            raise TrainingError(
                f"{last}: the checkpoint is damaged: {', '.join(damaged)} gone, or not as long as written",
                hint="remove that folder: --resume then goes on from the checkpoint before, or from the beginning",
            )
        return last

    def check_place(self) -> None:
        """Refuses a place that holds something else than a folder.

        Raises:
            TrainingError: So.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise TrainingError(
                f"{self.path}: is no folder, expected the run's or nothing",
                hint="the run of -o NAME lives in NAME.run: move that away, or choose another name",
            )

    def begin(self, description: Mapping[str, Any], *, resume: bool) -> None:
        """Starts a run, or checks that the one that is there is the same.

        Args:
            description: What `training.json` is to say: `settings`, `model` and `data` make the run what it is.
            resume: Go on with the run that is there.

        Raises:
            TrainingError: A run is there and `resume` is not set, or the other way round, or it is another run, or no
                folder at all.
        """
        self.check_place()
        file = self.path / DESCRIPTION_NAME
        if not resume:
            partial = file.with_name(f"{DESCRIPTION_NAME}.partial")  # what a kill may have left
            if self.path.exists() and {*self.path.iterdir()} - {partial}:
                raise TrainingError(
                    f"{self.path}: holds a training run already",
                    hint="go on with it by --resume, or remove the folder to start anew",
                )
            self.path.mkdir(parents=True, exist_ok=True)
            save_json(partial, description)
            partial.replace(file)
            return
        if not file.is_file():
            raise TrainingError(f"{self.path}: holds no training run to resume", hint="start it without --resume")
        if differences := [*_differences(read_json(file, TrainingError), description)]:
            raise TrainingError(
                f"{self.path}: the run to resume was started otherwise:\n  " + "\n  ".join(differences),
                hint="resume with the same model, data and settings, or start another run",
            )

    def remove_old_checkpoints(self) -> None:
        """Removes all but the newest checkpoints; what somebody added something to stays.

        Raises:
            MachineError: The system refuses.
        """
        for folder in self._checkpoints()[_KEPT:]:
            if is_ours(folder) and not unfamiliar_files(folder):
                try:
                    remove_written_files(folder)
                except OSError as err:
                    raise MachineError(
                        f"{folder}: an old checkpoint cannot be removed: {err.strerror}",
                        hint="mend that, then go on with --resume",
                    ) from err

    def save_log(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Writes the log anew: of what came after the checkpoint a run goes on from, nothing stays."""
        partial = self.path / f"{LOG_NAME}.partial"
        partial.write_text("".join(map(_line, entries)), encoding="utf-8")
        partial.replace(self.path / LOG_NAME)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends to the log."""
        with (self.path / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(_line(entry))

    def _checkpoints(self) -> list[Path]:
        """All that are there, the newest first."""
        found = [(int(match[1]), path) for path in self.path.glob("checkpoint-*") if (match := _match(path))]
        return [path for _, path in sorted(found, reverse=True)]


def _match(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name) if is_ours(path) else None


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(finite(entry), allow_nan=False) + "\n"


def _differences(started: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    current = json.loads(json.dumps(now))
    for part in _DEFINING:
        before, after = started.get(part), current.get(part)
        if not (isinstance(before, dict) and isinstance(after, dict)):
            if before != after:
                yield f"{part} is {after}, was {before}"
            continue
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                yield f"{part}.{key} is {after.get(key)}, was {before.get(key)}"
