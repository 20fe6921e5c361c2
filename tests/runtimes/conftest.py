from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.runtimes.graphs import DATA, Builds, routed_builds


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models spend their time in waking threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """The DLO authors' reference checkpoint, exported with compaction."""
    return routed_builds(DATA / "reference_mlp_routed", tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="session")
def expected() -> Iterator[np.lib.npyio.NpzFile]:
    """Token ids, logits and decisions the authors' code computes for the reference checkpoint."""
    with np.load(DATA / "reference_mlp_routed" / "expected.npz") as values:
        yield values
