"""Which TensorRT is here, which is missing, and what its log says."""

import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.exporter.tensorrt.backend import BACKENDS, check_backend, resolve_backend
from dlo_export.exporter.tensorrt.build_log import builder_errors, hint_for, without_source
from dlo_export.exporter.tensorrt.build_progress import PhaseProgress
from dlo_export.exporter.tensorrt.nodes import decoder_layer
from dlo_export.runtimes.tensorrt.gpu import find_gpu

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(find_gpu().target is not None, reason="this machine has a GPU")
no_enterprise = pytest.mark.skipif(BACKENDS["tensorrt"].is_installed(), reason="enterprise TensorRT is installed")


def without_rtx(tmp_path, code):
    """Runs code in an environment that has everything installed but TensorRT-RTX."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("tensorrt_rtx", "__editable__")) and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    return subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("choice", ["rtx", "auto"])
def test_resolve_backend_fails_when_rtx_is_missing(tmp_path, choice):
    result = without_rtx(
        tmp_path,
        f"""
        import sys
        from dlo_export.checkpoints.errors import MachineError
        from dlo_export.exporter.tensorrt.backend import resolve_backend
        try:
            resolve_backend({choice!r})
        except MachineError as error:
            print(error)
            sys.exit(error.exit_code)
        """,
    )
    assert result.returncode == 4, result.stderr
    assert "TensorRT-RTX" in result.stdout
    assert "hint: pip install 'dlo-export[rtx]'" in result.stdout


@no_enterprise
def test_resolve_backend_fails_when_enterprise_is_missing():
    with pytest.raises(MachineError, match="the Python package tensorrt is not installed") as caught:
        resolve_backend("tensorrt")
    assert caught.value.exit_code == 4
    assert "dlo-export[tensorrt]" in str(caught.value)


@no_gpu
def test_resolve_backend_takes_rtx_when_there_is_no_gpu():
    assert resolve_backend("auto") == ("rtx", "there is no GPU; TensorRT-RTX builds ahead of time without one")
    assert resolve_backend("rtx") == ("rtx", "asked for")


@no_gpu
def test_find_gpu_says_why_when_there_is_none():
    assert "NVIDIA driver" in find_gpu().reason


def test_check_backend_accepts_every_target_the_installed_rtx_knows():
    import tensorrt_rtx as trt  # noqa: PLC0415

    known = {name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert set(BACKENDS["rtx"].targets) == known
    assert check_backend("rtx", BACKENDS["rtx"].targets).name == "rtx"
    assert BACKENDS["rtx"].version() == trt.__version__


@pytest.mark.parametrize("target", ["sm90", "89", "ada", ""])
def test_check_backend_refuses_when_target_is_unknown(target):
    with pytest.raises(InputError, match=f"cannot build for {target}: it builds for sm75, ") as caught:
        check_backend("rtx", ("sm89", target))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (ITopKLayer model.routers.0.topk: K is "
            "beyond (3840). In processCheck at /_src/optimizer/shapeof/graphShapeAnalyzer.cpp:1066 In "
            "analyzeShapes at /_src/optimizer/shapeof/graphShapeAnalyzer.cpp:2825)",
            "API Usage Error: ITopKLayer model.routers.0.topk: K is beyond (3840).",
        ),
        (
            "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
            "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 2: out of memory))",
            "Cuda Runtime: (cudaError 2: out of memory)",
        ),
        ("no code, no source", "no code, no source"),
    ],
)
def test_without_source_keeps_the_message_when_sources_are_named(message, said):
    assert without_source(message) == said


def test_builder_errors_name_the_decoder_layer_when_a_node_is_named():
    assert builder_errors(["node model.layers.12.mlp.up_3 is odd", "out of memory"]) == [
        "node model.layers.12.mlp.up_3 is odd (decoder layer 12)",
        "out of memory",
    ]


def test_decoder_layer_reads_whole_numbers_when_names_carry_one():
    names = ("model.layers.1.mlp.up", "model.routers.11.topk", "model.layers.3", "submodel.layers.3", "embedded")
    assert [decoder_layer(name) for name in names] == [1, 11, 3, None, None]


def test_hint_for_takes_the_first_known_error():
    assert hint_for(["something new"]) == "run again with -v for TensorRT's whole log"
    assert "3840" in hint_for(["something new", "K exceeds the maximum value allowed (3840)", "Plugin not found"])


def test_phase_progress_never_falls_when_phases_nest_and_repeat(monkeypatch):
    monkeypatch.setattr("dlo_export.exporter.tensorrt.build_progress._SECONDS_BETWEEN", 0)
    told = []
    progress = PhaseProgress(lambda name, fraction: told.append((name, fraction)))
    progress.start("build", None, 4)
    progress.step("build", 0)
    progress.start("optimise", "build", 2)
    progress.step("optimise", 0)
    progress.finish("optimise")
    progress.start("optimise", "build", 2)
    progress.step("build", 3)
    assert told == [
        ("build", 0.0),
        ("build", 0.25),
        ("optimise", 0.25),
        ("optimise", 0.375),
        ("optimise", 0.375),
        ("build", 1.0),
    ]
