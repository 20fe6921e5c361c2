"""Runs the same step of a decoder graph again and again: prefill, or decode behind a cache it has filled itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.common.workers import serve
from dlo_export.checkpoints.interface import (
    ATTENTION_MASK,
    INPUT_IDS,
    KV_LENGTHS,
    LOGITS,
    POSITION_IDS,
    continuation_of,
    is_state_input,
)
from dlo_export.plugins.ort_registration import register_library


class DecoderStep:
    """One step with everything bound: feeds, cache, and buffers for the new cache, as `OnnxRuntimeRunner` binds them.

    Args:
        graph: A .onnx with the graph interface optimum and onnxruntime-genai use; beside its genai_config.json where it
            does not say itself how large its cache is.
        tokens: int64 [batch, past + sequence]; the first `past` fill the cache with a step of their own.
        sequence: Tokens of the step.
        threads: Of the session.
        shared_cache: Bind each layer's past and present to one buffer, as onnxruntime-genai does where the graph's
            GroupQueryAttention appends in place; what `--static-cache` makes is bound so in any case.
        spinning: Let idle threads spin, as ONNX Runtime does unless told otherwise.
        options: Session options to start from.
    """

    def __init__(
        self,
        graph: Path,
        tokens: np.ndarray,
        sequence: int,
        threads: int,
        *,
        shared_cache: bool = False,
        spinning: bool = True,
        options: ort.SessionOptions | None = None,
    ) -> None:
        self.graph = graph
        options = options or ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.cache_names = [name for name in self.inputs if is_state_input(name)]
        self.past_of = {continuation_of(name): name for name in self.cache_names}
        self.batch, past = tokens.shape[0], tokens.shape[1] - sequence
        shared_cache = shared_cache or KV_LENGTHS in self.inputs
        self.cache = self._empty_cache(tokens.shape[1] if shared_cache else 0)
        self.shared_cache = shared_cache
        if past:
            filled = self._bind(tokens[:, :past], 0)
            self.session.run_with_iobinding(filled)
            if not shared_cache:
                outputs = dict(zip(self._output_names(), filled.get_outputs(), strict=True))
                self.cache = {name: outputs[continuation_of(name)] for name in self.cache_names}
        self.step = self._bind(tokens[:, past:], past)

    def __call__(self) -> None:
        """Runs the step; the cache it starts from stays as it is."""
        self.session.run_with_iobinding(self.step)

    def outputs(self) -> dict[str, np.ndarray]:
        """Of the last run, by name."""
        values = zip(self._output_names(), self.step.get_outputs(), strict=True)
        return {name: value.numpy() for name, value in values}

    def _output_names(self) -> list[str]:
        return [value.name for value in self.session.get_outputs()]

    def _empty_cache(self, length: int) -> dict[str, ort.OrtValue]:
        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(self._shape(name, length), self._dtype(name)))
            for name in self.cache_names
        }

    def _shape(self, name: str, length: int) -> tuple[int, ...]:
        """Of a state of so many tokens: keys and values, or which tokens were active in a layer."""
        dims = self.inputs[name].shape
        if len(dims) == 2:
            return self.batch, length
        if isinstance(dims[1], int) and isinstance(dims[3], int):
            slots = dims[2] if isinstance(dims[2], int) else length
            return self.batch, dims[1], slots, dims[3]
        # onnxruntime-genai's own graphs name dimensions of the cache; the file beside them has the numbers.
        decoder = json.loads((self.graph.parent / "genai_config.json").read_text())["model"]["decoder"]
        return self.batch, decoder["num_key_value_heads"], length, decoder["head_size"]

    def _dtype(self, name: str) -> type[np.generic]:
        return np.bool_ if self.inputs[name].type == "tensor(bool)" else np.float32

    def _bind(self, tokens: np.ndarray, past: int) -> ort.IOBinding:
        total = past + tokens.shape[1]
        feeds = {
            INPUT_IDS: tokens,
            ATTENTION_MASK: np.ones((self.batch, total), np.int64),
            POSITION_IDS: np.tile(np.arange(past, total, dtype=np.int64), (self.batch, 1)),
            KV_LENGTHS: np.full(self.batch, total, np.int64),
        }
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in self.cache_names:
            binding.bind_ortvalue_input(name, self.cache[name])
        for name in self._output_names():
            past_name = self.past_of.get(name)
            if past_name is None:
                binding.bind_output(name)
                continue
            cache = self.cache[past_name]
            if not self.shared_cache:
                # Memory of ONNX Runtime's own: it outlives the binding, as long as a next step reads it.
                shape, dtype = self._shape(past_name, total), self._dtype(past_name)
                cache = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype)
            binding.bind_ortvalue_output(name, cache)
        return binding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path)
    parser.add_argument("tokens", type=Path, help="int64 [batch, past + sequence], .npy")
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shared-cache", action="store_true")
    parser.add_argument("--no-spinning", dest="spinning", action="store_false")
    parser.add_argument("--plugin-library", type=Path, help="libdlo_ort.so, for graphs with dlo operators")
    given = parser.parse_args()
    options = ort.SessionOptions()
    if given.plugin_library is not None:
        register_library(options, given.plugin_library)
    step = DecoderStep(
        given.graph,
        np.load(given.tokens),
        given.sequence,
        given.threads,
        shared_cache=given.shared_cache,
        spinning=given.spinning,
        options=options,
    )
    step()
    serve(step, {"next_token": int(step.outputs()[LOGITS][0, -1].argmax())})


if __name__ == "__main__":
    main()
