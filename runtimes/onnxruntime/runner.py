"""Runs a decoder graph in ONNX Runtime; the KV cache stays where ONNX Runtime writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnxruntime as ort

from dlo_export.runtimes.errors import ModelLoadError, StepError
from dlo_export.runtimes.onnxruntime.decoder_interface import DecoderInterface
from dlo_export.runtimes.onnxruntime.growing_cache import GrowingCache
from dlo_export.runtimes.runner import Decisions, FloatArray, Int64Array, StepResult, check_forcing, check_step

CPU = "CPUExecutionProvider"


class OnnxRuntimeRunner:
    """A `Runner` of any graph with DESIGN's interface: ours, optimum's, onnxruntime-genai's of standard operators.

    What a step outputs as `present` is bound as the next step's `past` where it lies.

    Args:
        model: A .onnx file, or a serialized model.
        weights_folder: Of a serialized model's external data.
        name: For reports; the file's name by default.
        threads: Of one operator; None leaves it to ONNX Runtime.
        allow_spinning: Let idle threads spin: faster alone, but several sessions in one process disturb each other.
        providers: Execution providers, best first; every one of them must be there.
        options: Session options to start from.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here, or a provider is not available.
        ModelInterfaceError: It is not a decoder with a KV cache.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        weights_folder: str | Path | None = None,
        name: str | None = None,
        threads: int | None = None,
        allow_spinning: bool = True,
        providers: Sequence[str] = (CPU,),
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
        self._session: ort.InferenceSession | None = open_session(model, self._name, options, providers)
        self._interface = DecoderInterface.from_session(self._session, self._name)
        self._batch: int | None = None
        self._past = 0
        self._cache: GrowingCache | None = None

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

    def reset(self, batch: int) -> None:
        """See `Runner`."""
        self._batch, self._past = batch, 0
        self._cache = GrowingCache(self._interface.empty_cache(batch), self._interface.present_of)

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
        """See `Runner`."""
        check_step(self, self._batch, self._past, input_ids, attention_mask, position_ids, force_active)
        check_forcing(self._name, self._interface.forced_layers, force_active)
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        arrays: dict[str, np.ndarray] = {
            name: np.ascontiguousarray(array, np.int64)
            for name, array in feeds.items()
            if name in self._interface.token_inputs
        }
        for layer, decisions in (force_active or {}).items():
            arrays[f"force_active.{layer}"] = np.ascontiguousarray(decisions, np.bool_)
        outputs = self._run(arrays, [*self._interface.observed(hidden_states)], input_ids.shape[1])
        self._past += input_ids.shape[1]
        logits = outputs["logits"].numpy()
        if last_logits and logits.shape[1] > 1:
            logits = logits[:, -1:].copy()  # a copy of one row, so that the rest can be freed
        return StepResult(
            float32(logits),
            {layer: float32(outputs[f"router_scores.{layer}"].numpy()) for layer in self._interface.scored_layers},
            {
                layer: float32(outputs[f"hidden.{layer}"].numpy())
                for layer in (self._interface.hidden_layers if hidden_states else ())
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache = None
        self._session = None

    def _run(self, arrays: Mapping[str, np.ndarray], observed: Sequence[str], sequence: int) -> dict[str, ort.OrtValue]:
        """Runs the session, advances the cache, and returns the observed outputs."""
        if self._session is None or self._cache is None:
            raise StepError(f"{self._name}: step after the runner was closed")
        binding = self._session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in observed:
            binding.bind_output(name, "cpu")
        self._cache.bind(binding, sequence)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
            raise StepError(f"{self._name}: ONNX Runtime failed: {err}") from err
        self._cache.advance()
        return dict(zip(observed, binding.get_outputs(), strict=False))


def open_session(
    model: str | Path | bytes, name: str, options: ort.SessionOptions, providers: Sequence[str]
) -> ort.InferenceSession:
    """A session on exactly the given providers.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here, or a provider is not available.
    """
    if missing := [provider for provider in providers if provider not in ort.get_available_providers()]:
        raise ModelLoadError(
            f"{name}: execution providers {missing} are not available, this ONNX Runtime has "
            f"{ort.get_available_providers()}",
            hint="install the onnxruntime build that has them, for example onnxruntime-gpu",
        )
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelLoadError(f"{model}: no such file, expected an ONNX model")
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=list(providers)
        )
    except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
        raise ModelLoadError(
            f"{name}: ONNX Runtime {ort.__version__} cannot load it: {err}",
            hint="the file is damaged, its external data is missing, or it needs another ONNX Runtime",
        ) from err
    # A provider that fails to start is dropped silently, and the CPU takes over.
    if dropped := [provider for provider in providers if provider not in session.get_providers()]:
        raise ModelLoadError(f"{name}: ONNX Runtime dropped {dropped} and would run on {session.get_providers()}")
    return session


def float32(array: np.ndarray) -> FloatArray:
    """The same numbers in float32; the array itself where they are."""
    return array if array.dtype == np.float32 else array.astype(np.float32)
