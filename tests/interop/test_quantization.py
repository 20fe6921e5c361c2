"""docs/artefact.md's recipes for quantising, run as they stand on a deepened and routed artefact."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.bare_session import BareSession

DOCUMENT = Path(__file__).parents[2] / "docs" / "artefact.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
RECIPES = [block for block in BLOCKS if "quantiz" in block]


@pytest.mark.parametrize(
    ("recipe", "folder", "op_type"),
    [*zip(RECIPES, ("artefact-int8", "artefact-int4"), ("MatMulInteger", "MatMulNBits"), strict=True)],
    ids=["int8", "int4"],
)
def test_recipe_quantizes_all_but_the_routers_when_run_on_an_artefact(
    recipe, folder, op_type, deepened_artefact, tmp_path, monkeypatch
):
    (tmp_path / "artefact").symlink_to(deepened_artefact)
    monkeypatch.chdir(tmp_path)
    exec(compile(recipe, str(DOCUMENT), "exec"), {})
    graph = onnx.load(Path(folder) / "model.onnx", load_external_data=False).graph
    left = [node.name for node in graph.node if node.op_type == "MatMul"]
    routers = [name for name in left if name.startswith("model.routers.")]
    assert routers
    # The head is tied: a product with the embeddings, which stay as they are.
    assert [name for name in left if name not in routers] == ["lm_head.logits"]
    assert sum(node.op_type == op_type for node in graph.node) > len(left)
    logits, exact = (prefill(Path(name) / "model.onnx") for name in (folder, "artefact"))
    # Zero matrices of injected layers included: a scale of zero would give NaN.
    assert np.isfinite(logits).all()
    assert np.sum(logits * exact) / np.linalg.norm(logits) / np.linalg.norm(exact) > 0.9


def prefill(graph):
    session, ids = BareSession(graph), np.arange(3, 15)[np.newaxis]
    session.reset(1)
    return session.step(ids, np.ones_like(ids), np.arange(ids.shape[1])[np.newaxis])["logits"]
