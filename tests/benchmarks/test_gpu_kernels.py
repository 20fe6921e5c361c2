"""What of the kernels' evidence a CPU can check."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.kernel_cases import MASKS, NUMPY, POISON, cases
from benchmarks.gpu_kernels import check, main
from benchmarks.kernel_correctness import judged, replay_case
from benchmarks.kernel_images import all_wanted, candidates, images_in, write_images
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.tiles import TILE_NAMES, tile_for
from dlo_export.plugins.variants import Variant

ROOT = Path(__file__).parents[2]


def has_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_check_holds_when_no_gpu_is_there():
    check()


@pytest.mark.skipif(has_driver(), reason="gpu_kernels: a CUDA driver is here")
def test_command_ends_with_four_when_no_driver_is_there(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), "--smoke"]) == 4
    assert "the NVIDIA driver is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("op_name", PLUGIN_OPS)
@pytest.mark.parametrize("tile", TILE_NAMES)
def test_cases_are_launched_with_their_tile_when_it_is_not_named(op_name, tile):
    found = list(cases(op_name, "float16", tile))
    assert {tile_for(case.scale.size) for case in found} == {tile}
    assert len({case.name for case in found}) == len(found)
    assert {case.mask for case in found} == set(MASKS)
    assert {mask for mask in MASKS if any(c.mask == mask and c.scale.size == 1 for c in found)} == (
        {"all", "none", "nan"} if tile == "decode" else set()
    )


@pytest.mark.parametrize("dtype", NUMPY)
def test_an_output_is_refused_when_one_element_is_wrong(dtype):
    case = next(cases("SkipDown", dtype, "decode", ("all",)))
    assert case.judge(case.expected)["passed"]
    wrong = case.expected.copy()
    wrong[0, 0, 5] += np.abs(wrong).max() / 8
    verdict = case.judge(wrong)
    assert not verdict["passed"]
    assert verdict["error"] > 0.1
    assert not judged([(case, wrong)], "here", "here")["passed"]


def test_replays_of_a_capture_share_weights_when_decisions_differ():
    captured, replays = replay_case("SkipGateUp", "bfloat16", "decode")
    assert all(case.inputs[2] is captured.inputs[2] for case in replays)
    assert len({case.scale.tobytes() for case in replays}) == len(replays)
    assert all(np.isfinite(case.inputs[0].astype(np.float32)).all() for case in replays)


def test_images_are_listed_as_they_are_launched_when_compiled(tmp_path):
    op_name, tile, sizes = next(candidates())
    portable = Variant("SkipDown", "float16", "decode", 80)
    wanted = [
        ("a", "candidate", Variant(op_name, "bfloat16", tile, 90, sizes)),
        ("b", "portable", portable),
    ]
    written = write_images(wanted, tmp_path)
    assert images_in(tmp_path) == written
    candidate, ptx = written
    assert candidate.sizes == sizes
    assert (tmp_path / candidate.file).read_bytes().startswith(b"\x7fELF")
    assert ptx.sizes == portable.sizes
    assert (tmp_path / ptx.file).read_bytes().endswith(b"}\n\x00")


def test_every_table_tile_is_among_the_images_when_all_are_wanted():
    wanted = all_wanted()
    assert len({stem for stem, _, _ in wanted}) == len(wanted)
    assert len([kind for _, kind, _ in wanted if kind == "table"]) == len(PLUGIN_OPS) * len(NUMPY) * len(TILE_NAMES)


def test_a_way_that_cannot_run_says_so_when_no_host_is_there(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernel_correctness"]
    command += ["--library", str(tmp_path / "libdlo_plugins.so"), "--host", "/bin/false"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    (row,) = map(json.loads, result.stdout.splitlines())
    assert row["passed"] is False
    assert row["exit_code"] == 1
    assert POISON == 0x7F  # as plugin_host.cpp has it
