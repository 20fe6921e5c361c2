"""The Triton kernels compiled ahead of time for every target, without a GPU."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.compile import compile_all, resource_table
from dlo_export.plugins.compile import main as compile_main
from dlo_export.plugins.contract import T_DTYPES
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.library.generate import main as generate_main
from dlo_export.plugins.ptx import ptx_of, without_scratch_parameters
from dlo_export.plugins.tiles import TILE_NAMES, jit_tile_of, tile_of
from dlo_export.plugins.variants import TARGETS, Variant, variants

PLUGINS = Path(__file__).parents[2] / "plugins"
MOST_SHARED_BYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB per block, by target


@pytest.fixture(scope="module")
def kernels():
    return compile_all(variants())


def test_every_variant_compiles_without_spills_when_no_gpu_is_there(kernels):
    assert [kernel.variant for kernel in kernels] == variants()
    assert {kernel.variant.target for kernel in kernels} == {80, 86, 89, 90, 100, 120} == set(TARGETS)
    spilling = [
        f"{k.variant.name}: {k.spill_bytes} bytes spilled, {k.stack_bytes} of stack"
        for k in kernels
        if k.spill_bytes or k.stack_bytes
    ]
    assert not spilling, f"{spilling}\n{resource_table(kernels)}"


@pytest.mark.parametrize("op_name", ["SkipGateUp", "SkipDown"])
def test_readme_shows_the_compilers_report_when_it_is_made_again(kernels, op_name):
    folder = {"SkipGateUp": "skip_gate_up", "SkipDown": "skip_down"}[op_name]
    bfloat16 = [k for k in kernels if (k.variant.op_name, k.variant.dtype) == (op_name, "bfloat16")]
    assert resource_table(bfloat16) in (PLUGINS / folder / "README.md").read_text()


def test_shared_memory_fits_every_target_when_compiled(kernels):
    assert not [k.variant.name for k in kernels if k.shared_bytes > 1024 * MOST_SHARED_BYTES[k.variant.target]]


def test_portable_ptx_needs_no_opt_in_shared_memory_when_a_quick_deploy_plugin_launches_it(kernels):
    assert not [k.variant.name for k in kernels if k.variant.target == 80 and k.shared_bytes > 48 * 1024]


def test_portable_ptx_assembles_for_later_gpus_when_no_cubin_fits(kernels, tmp_path):
    """As the driver does for capabilities without a cubin: 10.3 and 12.1 stand for them."""
    from triton import knobs  # noqa: PLC0415 - heavy

    for kernel in kernels:
        if (kernel.variant.target, kernel.variant.dtype) == (80, "bfloat16"):
            source = tmp_path / "kernel.ptx"
            source.write_text(kernel.ptx)
            for later in ("sm_103", "sm_121"):
                command = [knobs.nvidia.ptxas_blackwell.path, "-v", f"--gpu-name={later}", str(source)]
                result = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True)
                assert "0 bytes spill stores, 0 bytes spill loads" in result.stderr, kernel.variant.name


def test_weights_go_to_tensor_cores_sixteen_bytes_at_a_time_when_16_bit(kernels):
    """Without the promise that widths are multiples of 8 the compiler would load weights element by element."""
    for kernel in kernels:
        if kernel.variant.dtype != "float32":
            assert re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", kernel.ptx), kernel.variant.name
            assert "cp.async.cg.shared.global" in kernel.ptx, kernel.variant.name


def test_kernel_takes_schema_operands_and_three_integers_when_compiled(kernels):
    for kernel in kernels:
        head = kernel.ptx[kernel.ptx.index(".entry") : kernel.ptx.index("{")]
        assert re.findall(r"\.param \.(u64|u32)", head) == ["u64"] * 4 + ["u32"] * 3 + ["u64"], kernel.variant.name


def test_code_names_no_folder_when_compiled(kernels):
    assert not [k.variant.name for k in kernels if b".py" in k.cubin or ".py" in k.ptx]


def test_a_used_scratch_parameter_is_refused_when_stripping():
    ptx = (
        ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0,\n"
        "\t.param .u64 .ptr .global .align 1 k_param_1\n)\n.reqntid 32\n{{\n\tld.param.b64 %rd1, [{}];\n}}"
    )
    stripped = without_scratch_parameters(ptx.format("k_param_0"), 1)
    assert "k_param_1" not in stripped
    assert "k_param_0\n)" in stripped
    with pytest.raises(PluginError, match="reads its scratch parameter k_param_1"):
        without_scratch_parameters(ptx.format("k_param_1"), 1)
    with pytest.raises(PluginError, match="has 2 parameters; expected at least 3"):
        without_scratch_parameters(ptx.format("k_param_0"), 3)


def test_interpreter_setting_is_refused_when_compiling(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(PluginError, match="TRITON_INTERPRET"):
        ptx_of(Variant("SkipDown", "float16", "decode", 89))


@pytest.mark.parametrize("command", [compile_main, generate_main])
def test_command_refuses_an_output_that_is_a_file_before_it_compiles(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command(["--output", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, str(tmp_path / "file") in printed.err) == ("", True)


def test_command_prints_the_table_and_writes_the_files_when_one_target_is_asked(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dlo_export.plugins.compile",
        "--op",
        "SkipDown",
        "--dtype",
        "float16",
        "--target",
        "89",
    ]
    result = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| SkipDown | float16 | decode | sm_89 | 128 |" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        f"SkipDown_float16_{tile}_sm89.{kind}" for tile in TILE_NAMES for kind in ("cubin", "ptx")
    }


def test_jit_takes_the_tile_of_the_cubins_when_none_of_its_own_was_measured():
    own = {
        (op_name, name, dtype, target)
        for op_name, name, dtype, target in itertools.product(PLUGIN_OPS, TILE_NAMES, T_DTYPES, TARGETS)
        if jit_tile_of(op_name, name, dtype, target) != tile_of(op_name, name, dtype, target)
    }
    assert own == {(op_name, "decode", dtype, 90) for op_name in PLUGIN_OPS for dtype in ("float16", "bfloat16")}
