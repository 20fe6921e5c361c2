"""A decoder whose step a CUDA graph captures, on weights that a device holds; on a CPU the same graph, uncaptured."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from benchmarks.common.threshold_inputs import ACTIVE, threshold_name, thresholds_as_inputs
from benchmarks.gpu.decoder_edits import Edit
from benchmarks.gpu.device_session import (
    TORCH_TYPES,
    BoundRun,
    DeviceSession,
    random_weights,
    weights_as_inputs,
)
from benchmarks.gpu.random_decoder import RandomDecoder
from dlo_export.checkpoints.interface import CACHE_PARTS, INPUT_IDS, KV_LENGTHS, LOGITS, past_name, present_name
from dlo_export.exporter.target_graphs import build_captured_model

MAX_CACHE = 1024
OPTIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_IR_TYPES = {torch_type: onnx_type for onnx_type, torch_type in TORCH_TYPES.items()}


@dataclasses.dataclass(frozen=True)
class CapturedDecoder:
    """A captured decoder on a device.

    Attributes:
        source: What it was built from.
        session: It.
        weights: Its inputs that are weights, on the device.
        dtype: Of weights and cache.
        device: "cpu" or "cuda".
        open_s: Seconds that building and opening it took.
    """

    source: RandomDecoder
    session: DeviceSession
    weights: dict[str, torch.Tensor]
    dtype: torch.dtype
    device: str
    open_s: float

    @classmethod
    def open(  # noqa: PLR0913 - what a benchmark varies
        cls,
        source: RandomDecoder,
        dtype: torch.dtype,
        device: str,
        library: Path,
        weights: dict[str, torch.Tensor] | None = None,
        max_cache: int = MAX_CACHE,
        *,
        capture: bool = True,
        fuse_routers: bool = True,
        edit: Edit | None = None,
    ) -> CapturedDecoder:
        """Builds the graph and opens it.

        Args:
            source: Shape and routing.
            dtype: Of weights and cache.
            device: "cpu" or "cuda".
            library: libdlo_ort.so.
            weights: Those of a decoder of the same shape; drawn where there are none.
            max_cache: Slots of the cache.
            capture: On a GPU, whether steps are captured.
            fuse_routers: See `build_captured_model`.
            edit: Changes the finished graph in place.
        """
        start = time.monotonic()
        lowering = "plugin" if source.routed else "none"
        model = build_captured_model(source, lowering, max_cache, _IR_TYPES[dtype], fuse_routers=fuse_routers)
        if edit is not None:
            edit(model)
        thresholds_as_inputs(model)
        values = weights_as_inputs(model)
        session = DeviceSession(model, device, library if source.routed else None, capture=capture)
        open_s = round(time.monotonic() - start, 1)
        # A graph may read fewer weights than another one of its shape.
        held = random_weights(values, device) if weights is None else {name: weights[name] for name in values}
        return cls(source, session, held, dtype, device, open_s)

    def cache(self, batch: int, max_cache: int = MAX_CACHE) -> dict[str, torch.Tensor]:
        """Empty caches by the names of inputs."""
        config = self.source.config
        shape = (batch, config.num_kv_heads, max_cache, config.head_dim)
        names = [past_name(layer, part) for layer in range(config.num_layers) for part in CACHE_PARTS]
        return {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name in names}

    def step(self, batch: int, sequence: int, cache: dict[str, torch.Tensor], *, capture: bool = True) -> BoundRun:
        """A step of so many sequences and tokens on a cache, everything active."""
        config, device = self.source.config, self.device
        inputs = {
            INPUT_IDS: torch.zeros((batch, sequence), dtype=torch.int64, device=device),
            KV_LENGTHS: torch.full((batch,), sequence, dtype=torch.int64, device=device),
        }
        if self.source.routed:
            for layer in range(config.num_layers):
                inputs[threshold_name(layer)] = torch.full((batch, sequence), ACTIVE, device=device)
        logits = torch.zeros((batch, sequence, config.vocab_size), dtype=self.dtype, device=device)
        outputs = {LOGITS: logits}
        for layer in range(config.num_layers):
            for part in CACHE_PARTS:
                outputs[present_name(layer, part)] = cache[past_name(layer, part)]
        return self.session.bind({**inputs, **cache, **self.weights}, outputs, capture=capture)
