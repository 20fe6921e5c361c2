"""Whether an adapter meets the weights it was made from."""

from __future__ import annotations

from pathlib import Path

from dlo_export.checkpoints.adapter.adapter import AdapterError, DloAdapter
from dlo_export.exporter.sources.base_model import BaseModel
from dlo_export.runtimes.artefact.description import AdapterBase


def check_adapter_base(
    adapter: DloAdapter, base: BaseModel, folder: Path, *, force: bool, weights: bool = True
) -> AdapterBase:
    """Compares the hash an adapter names with the base model's.

    Routers are fitted to a checkpoint or a GGUF file, never to a graph, whose bytes are others even where its weights
    are the same: there nothing is compared.

    Args:
        adapter: Names its base, or does not.
        base: What it is to go on. Its weights are hashed, once: the description needs the hash anyway.
        folder: Of the adapter, for messages.
        force: Take another base too.
        weights: False hashes nothing, and compares nothing.

    Returns:
        What the description says of it.

    Raises:
        AdapterError: The base is another one.
    """
    if adapter.base_sha256 is None:
        return "not stated"
    if not base.is_built_here or not weights:
        return "not comparable"
    found = base.sha256()
    if found == adapter.base_sha256:
        return "same"
    if not force:
        raise AdapterError(
            f"adapter {folder}: was made from weights with sha256 {adapter.base_sha256[:12]}…, "
            f"those of {base.path} have {found[:12]}…",
            hint="use the model it was made from (in the same file format), or add --force-base",
        )
    return "forced"
