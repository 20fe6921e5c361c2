"""Files of a folder somebody gave: never one that lies elsewhere."""

from __future__ import annotations

from pathlib import Path

from dlo_export.checkpoints.errors import CheckpointError


def file_inside(folder: Path, name: str) -> Path:
    """The path of a regular file of a checkpoint or adapter.

    Links are followed within the folder, and within the repository's cache that a hub snapshot consists of links into.

    Raises:
        CheckpointError: It does not exist, is not a regular file, or lies outside.
    """
    path = folder / name
    try:
        root = folder.resolve()
        if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
            root = root.parent.parent
        real = path.resolve()
        is_file = real.is_file()
    except (OSError, ValueError, RuntimeError) as err:  # a name that no file can have, links in a circle
        raise CheckpointError(f"{path}: is no file's name here ({err})", hint="is the folder complete?") from err
    if not real.is_relative_to(root):
        raise CheckpointError(
            f"{path}: leads to {real}, outside its folder",
            hint="only files inside the model's or adapter's own folder are read: replace the link by the file",
        )
    if not is_file:
        raise CheckpointError(f"{path}: no such file", hint="is the folder complete?")
    return path
