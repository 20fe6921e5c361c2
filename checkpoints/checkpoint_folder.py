"""Checkpoint folders in Hugging Face form: tensors streamed to disk, in shards if they are large."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.disk_space import no_room_reported
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.formats.huggingface_folder import INDEX_FILE, SINGLE_FILE
from dlo_export.checkpoints.formats.safetensors_writer import save_safetensors
from dlo_export.checkpoints.lazy_tensors import LazyTensor, Progress

SaveCompanions = Callable[[Path, Mapping[str, Any]], None]
"""Writes config.json, with these keys changed, and the other small files of a checkpoint into a folder."""


def save_checkpoint(
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    *,
    save_companions: SaveCompanions,
    config_changes: Mapping[str, Any],
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        tensors: Under Hugging Face names; read one after the other, and released.
        folder: The folder to make.
        save_companions: Writes config.json and the tokenizer, see `Checkpoint.save_companions`.
        config_changes: What config.json says beyond the base model's.
        max_shard_bytes: Size of a safetensors file.
        overwrite: Replace a folder that holds something.
        progress: Called with the bytes written and their total.

    Raises:
        FolderExistsError: The folder is not empty and `overwrite` is not set.
        InputError: A tensor's dtype does not belong into a checkpoint.
        MachineError: The disk is full.
    """
    with no_room_reported(folder), whole_folder(folder, overwrite=overwrite) as staging:
        save_model_tensors(tensors, staging, max_shard_bytes=max_shard_bytes, progress=progress)
        save_companions(staging, config_changes)


def save_model_tensors(
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    *,
    max_shard_bytes: int = 5 << 30,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Writes a checkpoint's tensors: ``model.safetensors``, or shards of at most a size and their index.

    Args:
        tensors: Names and tensors, in the order they are to be written.
        folder: An existing folder.
        max_shard_bytes: Size of a shard; a single larger tensor makes a shard of its own.
        progress: Called with the bytes written and their total over all shards.

    Returns:
        The safetensors files written.
    """
    shards = _shards(tensors, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    paths, weight_map, done = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_safetensors(shard, folder / name, progress=_behind(done, total, progress))
        done += sum(tensor.nbytes for tensor in shard.values())
        weight_map.update(dict.fromkeys(shard, name))
        paths.append(folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return tuple(paths)


def _behind(before: int, total: int, progress: Progress | None) -> Progress | None:
    """The progress of one shard, told as that of all: so many bytes were written before it."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def _shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[dict[str, LazyTensor]]:
    """Cuts the tensors, in order, into groups of at most so many bytes."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.nbytes
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards
