"""The kernels of captured decode are compiled for GPUs that nobody needs to have."""

import subprocess

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from dlo_export.runtimes.torch.captured import attention_kernel, step_kernels
from dlo_export.runtimes.torch.captured.kernel_ops import slots_of, vector_columns

SHARED_BYTES = 99 * 1024  # the least that a served GPU gives one program
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = {"HEAD": 128, "WIDTH": 128, "GROUP": 4, "ROWS": 16, "SPLITS": 8}
# By kernel: the types of its arguments, T the model's, and its constants at an 8B's widths.
KERNELS = {
    "add_norm_kernel": ("T T T fp32 fp32 T T fp32 fp32 i32 f f f", {"ADDS": True, "ROUTES": True, "BLOCK": 4096}),
    "rotate_and_store_kernel": ("T i64 T T T T T i32 i32 i32 i32", {"HEAD": 128, "BLOCK": 64}),
    "attend_kernel": ("T i64 T T T T fp32 fp32 fp32 i32* T f i32 i32", HEADS),
    "gate_kernel": ("T T i32", {"BLOCK": 1024}),
    "vector_product_kernel": ("T T i32 T", {"COLUMNS": 0, "BLOCK": 4096}),
}
MLP = {"ROWS": 16, "COLUMNS": 32, "DEPTH": 64, "SCAN": 32, "UPCAST": False}
EARLY_KERNELS = {
    "early_skip_gate_up_kernel": ("T fp32 T T i32 i32 i32 T", MLP),
    "early_skip_down_kernel": ("T fp32 T T i32 i32 i32 T", MLP),
}


def compiled_kernel(name, dtype, target, types, constants):
    if name == "attend_kernel":
        constants = constants | {"BLOCK": slots_of(128, ITEMSIZE[dtype])}
    if name == "vector_product_kernel":
        constants = constants | {"COLUMNS": vector_columns(constants["BLOCK"], ITEMSIZE[dtype])}
    scalars = {"f": "fp32", "i32": "i32"}
    signature = [scalars.get(word, "*" + word.rstrip("*").replace("T", dtype)) for word in types.split()]
    kernel = getattr(attention_kernel if name == "attend_kernel" else step_kernels, name)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    assert len(signature) + len(constants) == len(kernel.arg_names)
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={**dict(zip(kernel.arg_names, signature, strict=False)), **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(constant),): value for constant, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, type_ in enumerate(signature) if type_ != "fp32"},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
    )


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_fits_every_gpu_when_compiled(name, dtype, target):
    types, constants = KERNELS[name]
    compiled = compiled_kernel(name, dtype, target, types, constants | {"EARLY": 0})
    assert compiled.metadata.shared <= SHARED_BYTES
    assert len(compiled.asm["cubin"]) > 1000
    assert "griddepcontrol" not in compiled.asm["ptx"]


EARLY_CASES = [(name, 2) for name in {**KERNELS, **EARLY_KERNELS} if name != "rotate_and_store_kernel"]


@pytest.mark.parametrize(("name", "early"), [*EARLY_CASES, ("vector_product_kernel", 1)])
def test_kernel_waits_before_it_writes_when_it_is_started_early(name, early):
    types, constants = {**KERNELS, **EARLY_KERNELS}[name]
    ptx = compiled_kernel(name, "bf16", 90, types, constants | {"EARLY": early}).asm["ptx"]
    wait, launch = (ptx.index(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents"))
    assert wait < ptx.index("st.global")
    assert (wait < launch) == (early == 1)
    if name == "vector_product_kernel":  # its weights are on their way by then
        assert ptx.index("ld.global") < wait


@pytest.mark.parametrize("depth", [2048, 8192])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_product_of_one_token_keeps_its_weights_in_registers_when_it_is_of_another_width(dtype, depth, tmp_path):
    compiled = compiled_kernel("vector_product_kernel", dtype, 90, "T T i32 T", {"BLOCK": depth, "EARLY": 2})
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    command = [knobs.nvidia.ptxas_blackwell.path, "-v", "--gpu-name=sm_90a", str(source), "-o", "/dev/null"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report
