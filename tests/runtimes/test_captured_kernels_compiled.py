"""The kernels of captured decode are compiled for GPUs that nobody needs to have."""

import pytest
import triton
from triton.backends.compiler import GPUTarget

from dlo_export.runtimes.torch.captured import step_kernels
from dlo_export.runtimes.torch.captured.step_ops import slots_of

SHARED_BYTES = 99 * 1024  # the least that a served GPU gives one program
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = {"HEAD": 128, "WIDTH": 128, "GROUP": 4, "ROWS": 16, "SPLITS": 8}
# By kernel: the types of its arguments, T the model's, and its constants at an 8B's widths.
KERNELS = {
    "add_norm_kernel": ("T T T fp32 fp32 T T fp32 fp32 i32 f f f", {"ADDS": True, "ROUTES": True, "BLOCK": 4096}),
    "rotate_and_store_kernel": ("T i64 T T T T T i32 i32 i32 i32", {"HEAD": 128, "BLOCK": 64}),
    "attend_kernel": ("T i64 T T T T fp32 fp32 fp32 i32* T f i32 i32", HEADS),
    "gate_kernel": ("T T i32", {"BLOCK": 1024}),
}


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_fits_every_gpu_when_compiled(name, dtype, target):
    types, constants = KERNELS[name]
    if name == "attend_kernel":
        constants = constants | {"BLOCK": slots_of(128, ITEMSIZE[dtype])}
    scalars = {"f": "fp32", "i32": "i32"}
    signature = [scalars.get(word, "*" + word.rstrip("*").replace("T", dtype)) for word in types.split()]
    kernel = getattr(step_kernels, name)
    assert len(signature) + len(constants) == len(kernel.arg_names)
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={**dict(zip(kernel.arg_names, signature, strict=False)), **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(constant),): value for constant, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, type_ in enumerate(signature) if type_.startswith("*")},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True},
    )
    assert compiled.metadata.shared <= SHARED_BYTES
    assert len(compiled.asm["cubin"]) > 1000
