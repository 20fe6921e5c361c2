"""Where benchmarks keep what they make: inputs, peers' environments, artefacts. Nothing of it is committed."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORKSPACE = REPOSITORY / ".peers"
