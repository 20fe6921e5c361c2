"""Writes any checkpoint as a folder in fp32: a quantised one is then not dequantised again by each model made of it.

python -m benchmarks.papers.float_checkpoint MODEL.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.papers.subjects import BaseModel

if __name__ == "__main__":
    with BaseModel(Path(sys.argv[1])) as base:
        base.save(base.model(), Path(sys.argv[2]))
