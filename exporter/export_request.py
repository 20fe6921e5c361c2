"""What an export is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtype_options import DTYPE_CHOICES
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.tensorrt.plan import TensorRtRequest


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """Arguments of `dlo-export`.

    Attributes:
        model: Checkpoint folder, `.gguf`, `.onnx`, or hub id in the local cache.
        output: Folder to make.
        adapter: DloAdapter folder.
        dtype: One of DTYPE_CHOICES, of weights, KV cache and logits: of the engines where there are any (model.onnx is
            fp32 then).
        lowering: "auto", or the name of what routed layers become, in engines where there are any. model.onnx gets
            the same where ONNX Runtime has it by itself, else what "auto" chooses.
        parity: Compare with PyTorch before the artefact appears.
        weights: False leaves `model.onnx.data` out, and reads no weight of the model's: a graph to look at, and to
            compile.
        weight_file_bytes: Of a file of weights at most; None puts all into one.
        force: Replace an artefact of this program's.
        allow_nonfinite: Let weights be NaN or infinite.
        force_base: Let the adapter be made from other weights.
        trt: Build TensorRT engines too; None builds none.
        ort_plugin_library: libdlo_ort.so, with which parity runs the plugin lowering.
        last_logits: Have model.onnx compute the logits of each sequence's last token only.
        remove_identity: Leave layers out that pass everything on.
        provider: Of ONNX Runtime, that model.onnx is made for, and parity runs on where it is there.
        static_cache: Tokens per sequence in a KV cache that ONNX Runtime writes in place, and on a GPU a CUDA graph
            captures a decode step with; None lets the cache grow.
        link_weights: Make hard links, not copies, of a graph's data files that stay as they are.

    Raises:
        InputError: There is no such dtype, or options contradict each other.
    """

    model: str
    output: Path
    adapter: Path | None = None
    dtype: str = "auto"
    lowering: str = "auto"
    parity: bool = True
    weights: bool = True
    weight_file_bytes: int | None = None
    force: bool = False
    allow_nonfinite: bool = False
    force_base: bool = False
    trt: TensorRtRequest | None = None
    ort_plugin_library: Path | None = None
    last_logits: bool = False
    remove_identity: bool = False
    provider: ProviderOption = "cpu"
    static_cache: int | None = None
    link_weights: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_CHOICES:
            raise InputError(f"--dtype {self.dtype}: no such type", hint=f"choose one of {', '.join(DTYPE_CHOICES)}")
        if self.trt is not None and self.provider != "cpu":
            raise InputError(
                f"--provider {self.provider} and --trt: beside engines, model.onnx is the fp32 graph that proves them "
                "on a CPU",
                hint="export twice, once with each",
            )
        if self.last_logits and self.captured:
            raise InputError(
                f"--last-logits and --static-cache with --provider {self.provider}: steps that are captured give every "
                "token's logits, of which the last row alone leaves the device",
                hint="leave --last-logits out",
            )
        if self.link_weights and not self.weights:
            raise InputError(
                "--link-weights and --no-weights: there is nothing to link where no weights are written",
                hint="leave one of the two out",
            )
        if self.trt is not None and self.static_cache is not None:
            raise InputError(
                "--static-cache and --trt: engines have a cache of their own, --trt-max-cache is its size",
                hint="leave one of the two out",
            )

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is to capture a decode step of model.onnx."""
        return self.static_cache is not None and self.provider != "cpu"

    @property
    def inputs(self) -> tuple[Path | None, ...]:
        """What is read, as far as it is given and no hub id: never replaced."""
        engine_library = self.trt.plugin_library if self.trt is not None else None
        return Path(self.model), self.adapter, engine_library, self.ort_plugin_library
