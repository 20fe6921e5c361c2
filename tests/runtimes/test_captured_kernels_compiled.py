"""The kernels of captured decode are compiled for GPUs that nobody needs to have."""

import pytest
import triton
from triton.backends.compiler import GPUTarget

from dlo_export.runtimes.torch.captured import step_kernels
from dlo_export.runtimes.torch.captured.step_ops import slots_of

SHARED_BYTES = 99 * 1024  # the least that a served GPU gives one program
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = {"HEAD": 128, "WIDTH": 128, "GROUP": 4, "ROWS": 16, "SPLITS": 8, "THREADS": 128}
NORM = {"ADDS": True, "ROUTES": True, "UNLESS_ACTIVE": False, "BLOCK": 4096, "THREADS": 128}
# What kernels are compiled with where nothing overlaps, and where all does, which takes compute capability 9.0.
APART = {"CHUNK": 0, "EARLY": 0}
EARLY = {"CHUNK": 256}
# By kernel: the types of its arguments, T the model's, and its constants at an 8B's widths.
KERNELS = {
    "add_norm_kernel": ("T T T fp32 fp32 T T fp32 fp32 T i32 i32 f f f", NORM),
    "rotate_and_store_kernel": ("T i64 T T T T T i32 i32 i32 i32", {"HEAD": 128, "BLOCK": 64}),
    "attend_kernel": ("T i64 T T T T fp32 fp32 fp32 i32* T T f i32 i32", HEADS),
    "gate_kernel": ("T T i32", {"BLOCK": 1024}),
    "product_kernel": ("T T i32 i32 i32 T", {"ROWS": 16, "COLUMNS": 32, "DEPTH": 128, "THREADS": 128, "UPCAST": False}),
    "vector_product_kernel": ("T T i32 i32 T", {"COLUMNS": 8, "BLOCK": 4096}),
}
MLP = {"ROWS": 16, "COLUMNS": 32, "DEPTH": 64, "SCAN": 32, "UPCAST": False, "THREADS": 128}
EARLY_KERNELS = {
    "early_skip_gate_up_kernel": ("T fp32 T T i32 i32 i32 T", MLP),
    "early_skip_down_kernel": ("T fp32 T T i32 i32 i32 T", MLP),
}


def compiled_kernel(name, dtype, target, types, constants):
    if name == "attend_kernel":
        constants = constants | {"BLOCK": slots_of(128, ITEMSIZE[dtype])}
    scalars = {"f": "fp32", "i32": "i32"}
    signature = [scalars.get(word, "*" + word.rstrip("*").replace("T", dtype)) for word in types.split()]
    kernel = getattr(step_kernels, name)
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
    compiled = compiled_kernel(name, dtype, target, types, constants | APART)
    assert compiled.metadata.shared <= SHARED_BYTES
    assert len(compiled.asm["cubin"]) > 1000
    assert not {"griddepcontrol", "prefetch"} & set(compiled.asm["ptx"].replace(".", " ").split())


@pytest.mark.parametrize("early", [1, 2])
@pytest.mark.parametrize("name", [name for name in {**KERNELS, **EARLY_KERNELS} if name != "rotate_and_store_kernel"])
def test_kernel_waits_before_it_writes_when_it_is_started_early(name, early):
    types, constants = {**KERNELS, **EARLY_KERNELS}[name]
    ptx = compiled_kernel(name, "bf16", 90, types, constants | EARLY | {"EARLY": early}).asm["ptx"]
    wait, launch = (ptx.index(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents"))
    assert wait < ptx.index("st.global")
    assert (wait < launch) == (early == 1)
    # A norm's readers are programs of their own; the gate and SkipDown read nothing ahead.
    if name not in {"add_norm_kernel", "gate_kernel", "early_skip_down_kernel"}:
        assert ptx.index("ld.global" if name == "vector_product_kernel" else "prefetch.L2") < wait
