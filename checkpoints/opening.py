"""Opens Llama checkpoints: Hugging Face folders, GGUF files, repositories in the local hub cache."""

from __future__ import annotations

import re
from pathlib import Path

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.formats.huggingface_folder import cached_snapshot, open_folder
from dlo_export.checkpoints.llama_checkpoint import Checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path_or_id: Path | str, *, weights: bool = True) -> Checkpoint:
    """Opens a Llama checkpoint without reading its weights.

    Args:
        path_or_id: A folder in Hugging Face form, a `.gguf` file, or the id of a hub repository that is already in
            the local cache. Nothing is downloaded.
        weights: False opens a folder that holds nothing but a config.json too: its tensors have no values then.

    Raises:
        InputError: There is no such checkpoint.
        CheckpointError: It is damaged, incomplete, or not a Llama this version exports.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return open_folder(path, weights=weights)
    if path.is_file() and path.suffix.lower() == ".gguf":
        # Imported here so that only GGUF files pay for loading the gguf package.
        from dlo_export.checkpoints.formats.gguf_checkpoint import open_gguf  # noqa: PLC0415

        return open_gguf(path)
    if path.is_file():
        raise InputError(
            f"{path}: expected a checkpoint folder or a .gguf file",
            hint="for a .safetensors file, give the folder that also holds its config.json",
        )
    # "owner/name", or the bare "name" of the oldest repositories.
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path_or_id)):
        return open_folder(cached_snapshot(str(path_or_id)), weights=weights)
    raise InputError(
        f"{path}: no such file or folder",
        hint="give a checkpoint's folder, a .gguf file, or a hub id in the local cache",
    )
