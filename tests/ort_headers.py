"""ONNX Runtime's C and C++ headers, which no Python package has: the folder `ORT_INCLUDE`, or Debian's package.

    make headers

downloads that package, a hundred kilobytes, and unpacks it into .headers/; nothing is installed. Its headers are
those of ONNX Runtime 1.21, which programs compile against to run with any newer library. Where there is no apt, or no
Debian behind it, it says so, and tests that compile against them are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".headers"
RELEASE = "trixie"
"""Of Debian: the first that has the package; on an older one its packages are not offered by themselves."""
PACKAGE = "libonnxruntime-dev"
HEADER = "onnxruntime_cxx_api.h"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


def ort_headers(header: str = HEADER) -> Path:
    """A folder with this header; skips the test where there is none."""
    folders = [Path(given)] if (given := os.environ.get("ORT_INCLUDE")) else [*FOLDER.glob("usr/include/onnxruntime*")]
    for folder in folders:
        if (folder / header).is_file():
            return folder
    return pytest.skip(f"{header} is not here: give ORT_INCLUDE, or run make headers")


def fetch() -> None:
    """Puts the package's files under .headers/, whole or not at all.

    Raises:
        FileNotFoundError: A program of apt's or dpkg's is not there.
        CalledProcessError: One of them failed.
        RuntimeError: apt knows no archive of Debian's.
    """
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".headers-") as temporary:
        folder = Path(temporary)
        # What apt knows lies in folders of its own, so that nobody needs to be root and nothing of the machine changes.
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "sources.list").write_text(f"deb [signed-by={KEYS}] {_archive()} {RELEASE} main\n")
        options = [
            *("-o", f"Dir::Etc::SourceList={folder / 'sources.list'}", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", f"Dir::State={folder / 'state'}", "-o", f"Dir::Cache={folder / 'cache'}"),
            *("-o", "Dir::State::status=/dev/null", "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3"),
        ]
        _run(["apt-get", "-qq", *options, "update"], folder)
        _run(["apt-get", "-qq", *options, "download", PACKAGE], folder)
        (package,) = folder.glob(f"{PACKAGE}_*.deb")
        _run(["dpkg-deb", "-x", str(package), "unpacked"], folder)
        shutil.rmtree(FOLDER, ignore_errors=True)
        (folder / "unpacked").rename(FOLDER)


def _archive() -> str:
    """Where this machine gets Debian's packages from."""
    targets = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], ROOT)
    for archive in targets.splitlines():
        if archive.rstrip("/").endswith("/debian"):
            return archive
    raise RuntimeError("apt has no archive of Debian's here")


def _run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout


def main() -> None:
    """Fetches what is missing; a machine without Debian's packages goes on without."""
    if [*FOLDER.glob(f"usr/include/onnxruntime*/{HEADER}")]:
        return
    try:
        fetch()
    except (OSError, subprocess.SubprocessError, RuntimeError) as err:
        print(
            f"ONNX Runtime's headers cannot be fetched here, C++ that needs them is not tested ({err})\n"
            "hint: give a folder that has them, ORT_INCLUDE=/path/to/onnxruntime/include",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
