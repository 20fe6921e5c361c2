"""Polygraphy on routed graphs as they are: what it says of them, and whether it finds our runner's outputs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from benchmarks.common.peers import is_installed
from benchmarks.common.workspace import WORKSPACE
from dlo_export.checkpoints.interface import is_state_input
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.runtimes.artefact.description import load_description
from tests.interop.environments import COMPARER, REQUIREMENTS

# Marks, so that nobody makes an artefact where it is not there.
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not is_installed(COMPARER, REQUIREMENTS / "polygraphy.txt"),
        reason=f"{COMPARER} is not installed: make test-interop",
    ),
]

KINDS = ("routed", "if", "attention", "attention_if", "layer", "active", "deepened")
TOLERANCES = ("--atol", "1e-5", "--rtol", "1e-5")
TOKENS = np.array([[5, 9, 14, 3, 27, 31, 8, 44]])


@pytest.fixture(params=KINDS)
def artefact(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_artefact")
    return folder


def polygraphy(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Its program, finished."""
    # Through its Python: programs of an environment that was moved name the old one.
    programs = WORKSPACE / COMPARER / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in (programs / "python", programs / "polygraphy", *arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=environment,
    )


def save_golden(artefact: Path, inputs: Path, outputs: Path, error: float = 0) -> None:
    """A first step's inputs, and our runner's logits of it, one of them wrong by `error`."""
    mask, positions = np.ones_like(TOKENS), np.arange(TOKENS.shape[1])[np.newaxis]
    with open_artefact(artefact) as runner:
        runner.reset(1)
        logits = runner.step(TOKENS, mask, positions).logits.copy()
    logits[0, -1, 0] += error
    feeds = {"input_ids": TOKENS, "attention_mask": mask, "position_ids": positions}
    types = {"float": np.float32, "bool": np.bool_}
    for value in load_description(artefact).interface.inputs:
        if is_state_input(value.name):
            sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
            feeds[value.name] = np.zeros((1, *sizes), types[value.dtype])
    save_json([feeds], str(inputs))
    golden = RunResults()
    golden.add([{"logits": logits}], runner_name="dlo")
    golden.save(str(outputs))


def test_polygraphy_describes_a_graph_when_it_is_routed(artefact: Path) -> None:
    shown = polygraphy("inspect", "model", artefact / "model.onnx", "--show", "layers")
    assert shown.returncode == 0, shown.stderr
    for value in load_description(artefact).interface.inputs:
        assert f"{value.name} [dtype=" in shown.stdout
    assert "model.routers.0" in shown.stdout


@pytest.mark.parametrize("error", [0, 1e-3])
def test_polygraphy_passes_a_routed_graph_when_its_logits_are_the_runners(
    artefact: Path, error: float, tmp_path: Path
) -> None:
    save_golden(artefact, tmp_path / "inputs.json", tmp_path / "golden.json", error)
    given = ["--load-inputs", tmp_path / "inputs.json", "--load-outputs", tmp_path / "golden.json"]
    compared = polygraphy("run", artefact / "model.onnx", "--onnxrt", *given, *TOLERANCES)
    assert ("PASSED | Output: 'logits'" in compared.stdout) == (not error), compared.stdout + compared.stderr
    assert (compared.returncode == 0) == (not error)
