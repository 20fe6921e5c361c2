"""What kind of folder this program wrote: one is replaced by its like only."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from dlo_export.checkpoints.files.written_files import (
    ADAPTER_FILE,
    ARTEFACT_FILE,
    RUN_FILE,
    TRAINING_FILE,
    read_object,
    written_names,
)


class FolderKind(StrEnum):
    """Kinds of folders, as messages call them."""

    ARTEFACT = "an artefact"
    FAILED_ARTEFACT = "an artefact that failed parity"
    ADAPTER = "an adapter"
    CHECKPOINT = "a checkpoint"
    TRAINED_CHECKPOINT = "a trained checkpoint"
    RUN_CHECKPOINT = "a training run's checkpoint"
    OTHER = "something else of dlo-export's"

    def may_replace(self, old: FolderKind) -> bool:
        """Whether a new folder of this kind takes the place of an old one, where that was asked for."""
        return self is old or (self, old) in _MORE_THAN_ITS_LIKE


# Never the other way round: what was trained, or what passed parity, is worth more than what did not.
_MORE_THAN_ITS_LIKE = {
    (FolderKind.TRAINED_CHECKPOINT, FolderKind.CHECKPOINT),
    (FolderKind.ARTEFACT, FolderKind.FAILED_ARTEFACT),
}


def folder_kind(folder: Path) -> FolderKind:
    """The kind of a folder that this program wrote, by the names of the files it wrote there.

    These are told by the folder's list, so that the kind stays what it is when files are gone; folders of versions
    that kept no list are known as `written_names` knows them.
    """
    names = written_names(folder)
    if ARTEFACT_FILE in names:
        return FolderKind.FAILED_ARTEFACT if _failed_parity(folder) else FolderKind.ARTEFACT
    if ADAPTER_FILE in names:
        return FolderKind.ADAPTER
    if RUN_FILE in names:
        return FolderKind.RUN_CHECKPOINT
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        return FolderKind.OTHER
    return FolderKind.TRAINED_CHECKPOINT if TRAINING_FILE in names else FolderKind.CHECKPOINT


def _failed_parity(folder: Path) -> bool:
    description = read_object(folder / ARTEFACT_FILE)
    parity = None if description is None else description.get("parity")
    return isinstance(parity, dict) and parity.get("verdict") == "FAIL"
