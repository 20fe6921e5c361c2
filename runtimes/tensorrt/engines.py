"""The engines of an artefact, read to be run."""

from __future__ import annotations

from pathlib import Path

from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.artefact.files import has_weights, verify_files
from dlo_export.runtimes.errors import ModelLoadError


def load_engines(folder: str | Path) -> tuple[EngineRecord, ...]:
    """Reads an artefact's engines; together they are one model (prefill and decode, where split).

    Args:
        folder: The artefact.

    Raises:
        ModelLoadError: It has no engines, one is missing or was changed, or its description is not what this version
            reads; with everything that is wrong.
        ModelInterfaceError: An engine is no decoder with a static cache.
    """
    description = load_description(Path(folder))
    if not description.engines:
        hint = "export the model again with --trt"
        if not has_weights(description, Path(folder)):  # its graphs may be there: engines hold the weights
            hint += ", and without --no-weights"
        raise ModelLoadError(f"{folder}: has no engines", hint=hint)
    engines = {engine.file for engine in description.engines}
    # What is loaded as native code is always what was built, however long reading it takes.
    verify_files(file for file in description.files if file.name in engines)
    for engine in description.engines:
        if engine.cache != "static":
            raise ModelLoadError(
                f"{engine.file}: has a {engine.cache} cache, and this runner runs static ones",
                hint="export the model again with --trt-cache static",
            )
        # Read here, so that whatever is wrong with it is said before a GPU is looked for.
        _ = engine.static_cache
    return description.engines
