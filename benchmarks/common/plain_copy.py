"""The copy of a folder's files that reading and writing large ones is compared with."""

from __future__ import annotations

from pathlib import Path

# Not cp: that writes holes without reading them, or as holes, and shares blocks where it can.
_SCRIPT = 'mkdir "$2"; for f in "$1"/*; do dd if="$f" of="$2/${f##*/}" bs=4M conv=fsync || exit; done'


def copy_command(source: Path | str, output: Path | str) -> list[str]:
    """Reads every byte, and writes it to the disk.

    Args:
        source: A folder of files.
        output: To make.
    """
    return ["sh", "-c", _SCRIPT, "sh", str(source), str(output)]
