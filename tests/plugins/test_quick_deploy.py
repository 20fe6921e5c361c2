"""The quick-deploy plugins with the real `tensorrt.plugin`."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.contract import T_DTYPES, operand_dtypes
from dlo_export.plugins.ptx import ptx_of
from dlo_export.plugins.tiles import TILE_NAMES
from dlo_export.plugins.variants import Variant

if importlib.util.find_spec("tensorrt_bindings") is None or shutil.which("cc") is None:
    missing = "tensorrt-cu13-bindings or a C compiler is not installed"
    pytest.skip(f"quick-deploy plugins: {missing}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BATCH, SEQUENCE, HIDDEN, INTERMEDIATE = 3, 40, 64, 96
DATA_TYPES = {kind.name: kind.tensorrt for kind in FLOATS}


@pytest.fixture(scope="module")
def answers():
    command = [sys.executable, str(Path(__file__).with_name("quick_deploy_on_rtx.py")), str(BATCH), str(SEQUENCE)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])  # TensorRT's own logger writes to stdout before it


def test_creators_are_in_the_registry_when_registered(answers):
    assert answers["missing"] == []


@pytest.mark.parametrize("op", PLUGIN_OPS.values(), ids=lambda op: op.name)
def test_output_and_types_follow_the_schema_when_tensorrt_asks(answers, op):
    sizes = {"batch": BATCH, "sequence": SEQUENCE, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    answer = answers[op.name]
    assert answer["output"] == [sizes[name] for name in op.outputs[0].dims]
    assert answer["output_type"] == "BF16"
    assert answer["formats"] == ["LINEAR"]
    assert answer["combinations"] == [
        [DATA_TYPES[dtype] for dtype in operand_dtypes(op, t_dtype)] for t_dtype in T_DTYPES
    ]


@pytest.mark.parametrize(
    ("op_name", "integers", "grids"),
    [
        ("SkipGateUp", [120, HIDDEN, INTERMEDIATE], {"1": (8, 3), "2": (2, 2)}),
        ("SkipDown", [120, INTERMEDIATE, HIDDEN], {"1": (8, 4), "2": (2, 1)}),
    ],
)
def test_launch_follows_the_shapes_when_tensorrt_asks_for_a_kernel(answers, op_name, integers, grids):
    kernels = answers[op_name]["kernels"]
    assert set(kernels) == set(grids)
    for (tactic, kernel), tile in zip(sorted(kernels.items()), TILE_NAMES, strict=True):
        entry, ptx, threads, shared_bytes = ptx_of(Variant(op_name, "bfloat16", tile, 80))
        assert (kernel["entry"], kernel["ptx"]) == (entry, ptx)
        assert re.search(r"^\.target sm_80$", ptx, re.MULTILINE)
        assert kernel["integers"] == integers
        assert kernel["launch"] == {
            "grid_x": grids[tactic][0],
            "grid_y": grids[tactic][1],
            "grid_z": 1,
            "block_x": threads,
            "block_y": 1,
            "block_z": 1,
            "shared_mem": shared_bytes,
        }
