"""ONNX Runtime's execution providers: those that `--provider` names, their settings, and what they cannot run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtypes import BFLOAT16, FLOAT16, FLOAT32, ElementType
from dlo_export.runtimes.errors import ProviderUnavailableError

MISSING_HINT = (
    "for CUDA: pip uninstall onnxruntime, pip install onnxruntime-gpu, with NVIDIA's driver and CUDA libraries; "
    "or take --provider cpu"
)
"""What to do where a provider is missing."""

SKIP_GATE_UP = "dlo::SkipGateUp"
"""The plugin lowering's first operator."""

GROUP_QUERY_ATTENTION = "com.microsoft::GroupQueryAttention"
"""How a graph attends that writes its cache in place."""

NORMING_ATTENTION = f"{GROUP_QUERY_ATTENTION}(q_norm_weight)"
"""The same with the norms of queries and keys inside."""


@dataclass(frozen=True)
class Gap:
    """What a provider has no kernel for.

    Attributes:
        dtype: Of weights and activations.
        operator: Which operator lacks it; None: so many that no decoder runs.
        reason: What ONNX Runtime says to it, in words for a report.
    """

    dtype: ElementType
    operator: str | None
    reason: str


@dataclass(frozen=True)
class Provider:
    """An execution provider and its settings.

    Attributes:
        name: As ONNX Runtime calls it.
        options: Its own options, as `InferenceSession(provider_options=…)` takes them.
        gaps: What it cannot run; a test asks ONNX Runtime whether they are still there.
        device: What ONNX Runtime calls the memory it computes in.
        reads_back: Keep outputs in that memory, and copy out of it what is asked for alone: pays where it is not the
            host's.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    gaps: tuple[Gap, ...] = ()
    device: str = "cpu"
    reads_back: bool = False

    @property
    def device_id(self) -> int:
        """Number of the GPU; 0 where there is none."""
        return int(self.options.get("device_id", "0"))

    @property
    def captures(self) -> bool:
        """Whether its sessions capture CUDA graphs."""
        return self.options.get("enable_cuda_graph") == "1"

    def with_cuda_graph(self) -> Provider:
        """The same, with sessions that capture the first run of a binding as a CUDA graph and replay it for the others.

        Every such run must then be of the same shapes, in the same memory, with no node left to the CPU.
        """
        return replace(self, options={**self.options, "enable_cuda_graph": "1"})

    def why_not_here(self) -> str | None:
        """Why this ONNX Runtime does not have it; None where it has. Whether it starts, a session finds out."""
        # Imported here: an export that runs nothing starts in less time and memory without it.
        import onnxruntime as ort  # noqa: PLC0415

        if self.name in (available := ort.get_available_providers()):
            return None
        return f"ONNX Runtime {ort.__version__} has no {self.name} here, it has {', '.join(available)}"

    def check_here(self) -> None:
        """Refuses a provider that is not there.

        Raises:
            ProviderUnavailableError: With what to install.
        """
        if (reason := self.why_not_here()) is not None:
            raise ProviderUnavailableError(reason, hint=MISSING_HINT)

    def why_not_run(self, dtype: ElementType, operators: Collection[str] = ()) -> str | None:
        """Why a graph cannot run here; None where nothing is known against it.

        Args:
            dtype: Of its weights and activations.
            operators: Those in it that a gap may name.
        """
        reasons = (gap.reason for gap in self.gaps if gap.dtype == dtype and gap.operator in (None, *operators))
        return next(reasons, None)


# Measured with ONNX Runtime 1.32. Other float16 kernels that the CPU lacks, ONNX Runtime replaces by casts to float32.
CPU = Provider(
    "CPUExecutionProvider",
    gaps=(
        Gap(BFLOAT16, None, "ONNX Runtime's CPU provider does not implement bfloat16"),
        Gap(FLOAT16, SKIP_GATE_UP, "libdlo_ort.so computes float32 alone on a CPU"),
        *(
            Gap(dtype, NORMING_ATTENTION, "ONNX Runtime's CPU provider norms no queries and keys inside of attention")
            for dtype in (FLOAT32, FLOAT16)
        ),
    ),
)

CUDA = Provider(
    "CUDAExecutionProvider",
    # TensorFloat-32 keeps 10 bits of a product's operands: float32 would then not be float32.
    {"use_tf32": "0"},
    gaps=(
        Gap(
            FLOAT32,
            GROUP_QUERY_ATTENTION,
            "ONNX Runtime's CUDA provider has no float32 attention on a cache that is written in place",
        ),
    ),
    device="cuda",
    reads_back=True,
)
"""Its gaps are from ONNX Runtime's docs/OperatorKernels.md; what else it lacks, loading or running a graph says."""

BY_OPTION: Mapping[ProviderOption, Provider] = {"cpu": CPU, "cuda": CUDA}
"""What `--provider` names."""
