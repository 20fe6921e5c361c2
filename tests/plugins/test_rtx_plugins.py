"""The plugins in TensorRT-RTX: shim, twins, and the engines built with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlo_export.plugins.contract import SIZES_HINT, T_DTYPES

ROOT = Path(__file__).parents[2]


def build(plugins, t_dtype, hidden=64, intermediate=96):
    command = [sys.executable, str(Path(__file__).with_name("build_on_rtx.py"))]
    command += [str(plugins), t_dtype, str(hidden), str(intermediate)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout) | {"stderr": result.stderr}


@pytest.mark.parametrize("t_dtype", T_DTYPES)
def test_plugin_graph_builds_into_an_engine_when_twins_are_registered(t_dtype):
    answer = build("twins", t_dtype)
    assert answer["before"] == ["SkipGateUp", "SkipDown"]
    assert answer["after"] == []
    assert answer["fields"] == {"SkipGateUp": 0, "SkipDown": 0}
    assert answer["parsed"], answer
    assert answer["output"] == [{"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[t_dtype], [-1, -1, 64]]
    assert answer["engine"] > 3 * 64 * 96 * (4 if t_dtype == "float32" else 2)


def test_twin_refuses_with_sizes_when_a_width_is_no_multiple_of_eight():
    answer = build("twins", "bfloat16", hidden=60, intermediate=100)
    assert answer["parsed"] is False
    assert "dlo::SkipGateUp has hidden 60; expected a multiple of 8" in answer["stderr"]
    assert "dlo::SkipGateUp has intermediate 100; expected a multiple of 8" in answer["stderr"]
    assert f"hint: {SIZES_HINT}" in answer["stderr"]


def test_library_is_refused_when_it_does_not_exist(tmp_path):
    answer = build(tmp_path / "libdlo_plugins.so", "bfloat16")
    assert "no such file; expected libdlo_plugins.so" in answer["refused"]
    assert "hint: build it" in answer["refused"]


def test_library_is_refused_when_it_is_none(tmp_path):
    file = tmp_path / "libdlo_plugins.so"
    file.write_text("not a library")
    answer = build(file, "bfloat16")
    assert "has no getCreators" in answer["refused"]


def test_shim_is_refused_when_tensorrt_rtx_is_not_imported():
    code = "from dlo_export.plugins.rtx_shim import provide_unversioned_library as f; f()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode
    assert "libtensorrt_rtx.so.1 is not loaded in this process" in result.stderr
    assert "hint: import tensorrt_rtx first" in result.stderr


def test_twin_says_what_to_load_when_it_is_asked_to_run():
    from dlo_export.graph_passes.spec.ops import PLUGIN_OPS  # noqa: PLC0415 - beside tensorrt_rtx, which the other tests keep away
    from dlo_export.plugins.errors import PluginError  # noqa: PLC0415
    from dlo_export.plugins.rtx_twins import PluginTwin  # noqa: PLC0415

    with pytest.raises(PluginError, match=r"dlo::SkipDown was asked to run(.|\n)*load_library"):
        PluginTwin(PLUGIN_OPS["SkipDown"]).enqueue()
