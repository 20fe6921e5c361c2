"""Runs a part of a decoder in ONNX Runtime: a layer, what comes before the first, what comes behind the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self, Unpack

import numpy as np

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.decoder_interface import TensorSpec
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.onnxruntime.machine_faults import check_machine
from dlo_export.runtimes.onnxruntime.session import SessionArguments, open_session, tensor_specs
from dlo_export.runtimes.parity.by_layer import PartOutput
from dlo_export.runtimes.parity.cases import Feed
from dlo_export.runtimes.runner import BoolArray, FloatArray, float32


class OnnxRuntimePart:
    """A session of a part; a context manager.

    Args:
        model: The serialized part, as `KeepPartPass` leaves it.
        name: For messages.
        session: How it runs.

    Raises:
        ModelLoadError: It cannot run here.
    """

    def __init__(self, model: bytes, name: str, **session: Unpack[SessionArguments]) -> None:
        self._name = name
        self._session = open_session(model, name, session)
        self._inputs = {spec.name: spec for spec in tensor_specs(self._session.get_inputs())}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._states: dict[str, np.ndarray] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session

    def reset(self, batch: int) -> None:
        """Forgets the cached tokens.

        Args:
            batch: Sequences of the steps to come.
        """
        self._states = {
            name: np.zeros([batch, *(size if isinstance(size, int) else 0 for size in spec.shape[1:])], _type(spec))
            for name, spec in self._inputs.items()
            if names.is_state_input(name)
        }

    def step(self, stream: FloatArray | None, feed: Feed, active: BoolArray | None) -> PartOutput:
        """Runs a step behind the cached tokens.

        Args:
            stream: float32 [batch, sequence, hidden]; None in front of the embedding.
            feed: The step's tokens.
            active: Who does not skip the layer, bool [batch, sequence]; None where it is not routed.

        Raises:
            StepError: ONNX Runtime failed.
        """
        given: Mapping[str, np.ndarray | None] = {
            names.STREAM_IN: stream,
            names.INPUT_IDS: feed.input_ids,
            names.ATTENTION_MASK: feed.attention_mask,
            names.POSITION_IDS: feed.position_ids,
            **self._states,
        }
        feeds: dict[str, np.ndarray] = {}
        for name, spec in self._inputs.items():
            array = given.get(name, active)  # the decision is the only one whose name says which layer it is of
            assert array is not None, f"{name} was not given"
            feeds[name] = np.ascontiguousarray(array, _type(spec))
        try:
            found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
            check_machine(self._name, err)
            raise StepError(f"{self._name}: ONNX Runtime failed: {err}", hint="a kernel refused the step") from err
        self._states = {past: found.pop(names.continuation_of(past)) for past in self._states}
        main = names.STREAM_OUT if names.STREAM_OUT in found else names.LOGITS
        values = float32(found.pop(main))
        return PartOutput(values, float32(next(iter(found.values()))) if found else None)


def _type(spec: TensorSpec) -> np.dtype:
    kind = spec.element_type
    assert kind is not None, f"{spec.name}: ONNX Runtime loaded it, and parts are cut from graphs of known types"
    return np.dtype(kind.numpy)
