"""Engines built before, in a folder of the user's, found by what decides their content."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.files.regular_file import regular_size
from dlo_export.checkpoints.files.whole_folder import FolderExistsError, whole_folder
from dlo_export.checkpoints.files.written_files import LIST_NAME
from dlo_export.runtimes.artefact.engine_record import EngineBuild
from dlo_export.runtimes.artefact.typed_json import from_json, to_json

VARIABLE = "DLO_EXPORT_CACHE"
_SIZE_VARIABLE = "DLO_EXPORT_CACHE_GB"
_DEFAULT_GB = 50.0
_ENGINE, _BUILD = "model.engine", "engine.json"


def cache_folder() -> Path | None:
    """The folder DLO_EXPORT_CACHE names, else the user's cache folder; None for no cache.

    There is none where the variable is empty, and where it is not set and nothing tells the user's home.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "dlo-export"
    try:
        return Path.home() / ".cache" / "dlo-export"
    except RuntimeError:
        return None


def cache_limit() -> float:
    """The bytes that the cache may take, by DLO_EXPORT_CACHE_GB.

    Raises:
        InputError: The variable is no number from 0 on.
    """
    given = os.environ.get(_SIZE_VARIABLE) or str(_DEFAULT_GB)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = -1.0
    if not (math.isfinite(gigabytes) and gigabytes >= 0):
        raise InputError(
            f"{_SIZE_VARIABLE} is {given!r}, expected the gigabytes of the engine cache, a number from 0 on",
            hint=f"set it to a number such as {_DEFAULT_GB:.0f}, or unset it",
        )
    return gigabytes * 2**30


class EngineCache:
    """The cache in one folder, which is made when something is stored.

    Args:
        folder: Of the cache.
        tell: Called with what the user should know: a damaged entry, a cache that cannot be written.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.folder, self._tell = folder / "engines", tell

    def fetch(self, key: str, output: Path) -> EngineBuild | None:
        """Copies an engine to its place, verified.

        A damaged entry is named, removed, and counts as missing.

        Args:
            key: Of a `Fingerprint`.
            output: Where the engine goes.

        Returns:
            The build that made it; None where the cache does not hold it.
        """
        entry = self.folder / key
        if not _is_entry(entry):
            return None
        partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
        try:
            build = from_json(EngineBuild, read_json(entry / _BUILD), entry)
            regular_size(entry / _ENGINE)  # a pipe would be waited for
            found = _copy(entry / _ENGINE, partial)
            if found != build.sha256:
                raise ValueError(f"{entry / _ENGINE}: its sha256 is {found}, expected {build.sha256}")
            partial.rename(output)
        except (OSError, ValueError) as err:
            if isinstance(err, OSError) and err.filename != str(entry / _ENGINE):
                raise  # of the copy: the disk is full, say
            self._tell(f"engine cache: removed a damaged entry, building again: {err}")
            self._remove(entry)
            return None
        finally:
            partial.unlink(missing_ok=True)
        os.utime(entry)  # the oldest in use go first
        return build

    def store(self, build: EngineBuild, engine: Path) -> None:
        """Keeps a copy of a built engine; a cache that cannot hold it is named and left as it is.

        Args:
            build: Which made it.
            engine: The file.
        """
        entry = self.folder / build.cache_key
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(entry) as folder:
                _copy(engine, folder / _ENGINE)
                save_json(folder / _BUILD, to_json(build, folder))
            self._prune(keep=entry)
        except FolderExistsError:
            return  # another command built the same
        except OSError as err:
            self._tell(f"engine cache: {entry} was not kept: {err.strerror}")
        except MachineError as err:
            self._tell(f"engine cache: {str(err).splitlines()[0]}")

    def timings(self, backend: str, version: str, target: str) -> Path:
        """File of the timing cache: timings hold for one version on one GPU."""
        return self.folder.parent / "timings" / f"{backend}-{version}-{target}.cache"

    def _prune(self, keep: Path) -> None:
        """Removes the entries unused for longest until the rest fits the limit."""
        limit = cache_limit()
        found = [entry for entry in self.folder.glob("[0-9a-f]" * 64) if _is_entry(entry)]
        entries = sorted(found, key=lambda entry: entry.stat().st_mtime)
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
        total = sum(sizes.values())
        for entry in entries:
            if total <= limit:
                return
            if entry != keep:
                self._remove(entry)
                total -= sizes[entry]

    def _remove(self, entry: Path) -> None:
        """Removes an entry's own files; what else a user may have put there stays, and is named."""
        try:
            for name in (_ENGINE, _BUILD, LIST_NAME):
                (entry / name).unlink(missing_ok=True)
            entry.rmdir()
        except FileNotFoundError:
            return  # another command has removed it
        except OSError as err:
            self._tell(f"engine cache: {entry} cannot be removed: {err.strerror}")


def _is_entry(folder: Path) -> bool:
    """Whether this is a folder, and no link to somebody's: what an entry holds is removed when its time comes."""
    return folder.is_dir() and not folder.is_symlink()


def _copy(source: Path, target: Path) -> str:
    """Copies a file; returns the sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while part := read.read(2**24):
            digest.update(part)
            write.write(part)
    return digest.hexdigest()
