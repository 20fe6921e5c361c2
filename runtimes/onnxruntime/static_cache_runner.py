"""Runs a TensorRT graph with a static KV cache in ONNX Runtime: what an engine computes, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnxruntime as ort

from dlo_export.runtimes.errors import ModelInterfaceError, StepError
from dlo_export.runtimes.onnxruntime.runner import CPU, float32, open_session
from dlo_export.runtimes.runner import Decisions, Int64Array, StepResult, check_forcing, check_step
from dlo_export.runtimes.static_cache.batches import StaticCache, StaticCacheLimits
from dlo_export.runtimes.static_cache.interface import StaticCacheInterface, TensorSpec
from dlo_export.runtimes.static_cache.results import check_logits, step_result

_ELEMENT_TYPES = {"float": np.float32, "float16": np.float16}


class StaticCacheRunner:
    """A `Runner` of the graph that a TensorRT engine is built from.

    ONNX Runtime's CPU provider runs float32 graphs (and float16 ones where it has the kernels): export the fp32 twin.

    Args:
        model: A .onnx file, or a serialized model.
        weights_folder: Of a serialized model's external data.
        name: For reports; the file's name by default.
        threads: Of one operator; None leaves it to ONNX Runtime.
        allow_spinning: See `OnnxRuntimeRunner`.
        max_batch: Refuse larger batches, as the engine's profiles would; None takes any.
        max_sequence: Refuse longer steps, likewise.
        options: Session options to start from.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here.
        ModelInterfaceError: It is no decoder with a static cache.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        weights_folder: str | Path | None = None,
        name: str | None = None,
        threads: int | None = None,
        allow_spinning: bool = True,
        max_batch: int | None = None,
        max_sequence: int | None = None,
        options: ort.SessionOptions | None = None,
    ) -> None:
        self._name = name or ("model" if isinstance(model, bytes) else Path(model).name)
        options = options or ort.SessionOptions()
        options.log_severity_level = 3  # warnings of ONNX Runtime's own passes are not for users
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
        if weights_folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(Path(weights_folder).absolute())
            )
        self._session: ort.InferenceSession | None = open_session(model, self._name, options, (CPU,))
        self._interface = StaticCacheInterface.of(
            _specs(self._session.get_inputs()), _specs(self._session.get_outputs()), self._name
        )
        types = {self._interface.inputs[key].dtype for key in self._interface.present_of}
        if unknown := sorted(types - _ELEMENT_TYPES.keys()):
            raise ModelInterfaceError(
                f"{self._name}: the cache is {' and '.join(unknown)}, expected {' or '.join(_ELEMENT_TYPES)}",
                hint="ONNX Runtime's CPU provider has no bfloat16: build the graph's float32 twin",
            )
        self._tokens = StaticCache(self._name, StaticCacheLimits(self._interface.max_cache, max_batch, max_sequence))
        self._cache: dict[str, ort.OrtValue] = {}

    @property
    def name(self) -> str:
        """See `Runner`."""
        return self._name

    @property
    def num_layers(self) -> int:
        """See `Runner`."""
        return self._interface.num_layers

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """See `Runner`."""
        return self._interface.routed_layers

    @property
    def max_cache(self) -> int:
        """Slots for tokens in the cache, per sequence."""
        return self._interface.max_cache

    def reset(self, batch: int) -> None:
        """See `Runner`; the cache is zeroed, because masked slots must still be numbers."""
        self._tokens.reset(batch)
        self._cache = {}
        for name in self._interface.present_of:
            spec = self._interface.inputs[name]
            shape = (batch, *(size for size in spec.shape[1:] if isinstance(size, int)))
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _ELEMENT_TYPES[spec.dtype]))

    def step(
        self,
        input_ids: Int64Array,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        *,
        force_active: Decisions | None = None,
        last_logits: bool = False,
        hidden_states: bool = False,
    ) -> StepResult:
        """See `Runner`; what is computed for padding comes back as 0.

        Raises:
            StepError: As `Runner.step`; or the step does not fit into the cache or the limits, or all logits are asked
                for of a graph that keeps the last token's.
        """
        check_step(self, self._tokens.batch, self._tokens.past, input_ids, attention_mask, position_ids, force_active)
        check_forcing(self._name, self._interface.forced_layers, force_active)
        check_logits(self._name, self._interface, input_ids.shape[1], last_logits)
        step = self._tokens.next_step(input_ids, attention_mask, position_ids, force_active)
        outputs = self._run(step.feeds)
        self._tokens.append(step)
        return step_result(self._interface, step, outputs, last_logits=last_logits, hidden_states=hidden_states)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache = {}
        self._session = None

    def _run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the session on the cache, in place as an engine does, and returns the other outputs."""
        if self._session is None:
            raise StepError(f"{self._name}: step after the runner was closed")
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            # TensorScatter sees that both are one buffer, and copies nothing.
            binding.bind_ortvalue_output(self._interface.present_of[name], value)
        for name in self._interface.observed:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
            raise StepError(f"{self._name}: ONNX Runtime failed: {err}") from err
        values = binding.get_outputs()[len(self._cache) :]  # in the order they were bound
        return {name: float32(value.numpy()) for name, value in zip(self._interface.observed, values, strict=True)}


def _specs(arguments: Sequence[ort.NodeArg]) -> list[TensorSpec]:
    return [
        TensorSpec(argument.name, argument.type.removeprefix("tensor(").removesuffix(")"), tuple(argument.shape))
        for argument in arguments
    ]
