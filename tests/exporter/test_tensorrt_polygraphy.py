"""Polygraphy's commands on graphs in TensorRT's form, with TensorRT-RTX and no enterprise TensorRT.

What does not work there (polygraphy 0.53): `inspect model --display-as trt` imports `tensorrt` whatever the variable
says, and inspecting an engine needs a GPU.
"""

import os
import subprocess
import sysconfig
import textwrap
from pathlib import Path

import pytest

from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.export import optimization_profiles, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt
from tests.exporter.tiny_engines import save_request

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "data" / "reference_mlp_routed"
ENVIRONMENT = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(ROOT)}


def polygraphy(*arguments):
    command = [str(Path(sysconfig.get_path("scripts")) / "polygraphy"), *map(str, arguments)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shape_arguments(wanted):
    """Of all profiles."""
    given = []
    for profile in wanted:
        for position, option in enumerate(("min", "opt", "max")):
            shapes = [f"{name}:[{','.join(map(str, sizes[position]))}]" for name, sizes in profile.shapes.items()]
            given += [f"--trt-{option}-shapes", *shapes]
    return given


@pytest.fixture
def graph(tmp_path):
    def save(lowering):
        asked = save_request(tmp_path, lowering, 3)
        return asked.graph, asked.profiles

    return save


def test_polygraphy_inspect_shows_nodes_when_graph_has_plugins(graph):
    path, _ = graph("plugin")
    shown = polygraphy("inspect", "model", path, "--show", "layers")
    assert shown.count("[Op: SkipGateUp]") == shown.count("[Op: SkipDown]") == 3
    assert "write_indices [dtype=int64, shape=('batch',)]" in shown


@pytest.mark.parametrize("lowering", ["compact", "if"])
def test_polygraphy_convert_builds_engine_when_graph_has_no_plugins(graph, tmp_path, lowering):
    path, profiles = graph(lowering)
    engine = tmp_path / "model.engine"
    options = ("--decomposable-attentions", "--compute-capabilities", "8.9", "12.0", *shape_arguments(profiles))
    shown = polygraphy("convert", path, "-o", engine, *options)
    assert "Setting 2 target compute capabilities" in shown
    assert engine.stat().st_size > 10**6


def test_polygraphy_inspects_and_converts_the_graph_an_export_writes(tmp_path):
    source = open_source(str(REFERENCE), None)
    plan = plan_tensorrt(source, TensorRtRequest(backend="rtx", max_sequence=32, max_cache=64), "compact", "bf16")
    save_graphs(plan, tmp_path, Reporter())
    (planned,) = plan.engines
    given = shape_arguments(optimization_profiles(planned))
    source.close()
    assert polygraphy("inspect", "model", tmp_path / "model.onnx", "--show", "layers").count("[Op: TopK]") == 3
    engine = tmp_path / "model.engine"
    polygraphy("convert", tmp_path / "model.onnx", "-o", engine, "--decomposable-attentions", *given)
    assert engine.stat().st_size > 10**6


def test_polygraphy_convert_builds_engine_when_a_script_registers_the_twins(graph, tmp_path):
    path, profiles = graph("plugin")
    script, engine = tmp_path / "network.py", tmp_path / "model.engine"
    script.write_text(
        textwrap.dedent(f"""
            import dlo_export.plugins.registration
            from polygraphy.backend.trt import network_from_onnx_path

            def load_network():
                dlo_export.plugins.registration.register_twins()
                return network_from_onnx_path({str(path)!r})
        """)
    )
    options = ("--model-type", "trt-network-script", "--compute-capabilities", "8.9", *shape_arguments(profiles))
    polygraphy("convert", script, "-o", engine, *options)
    assert engine.stat().st_size > 10**6
