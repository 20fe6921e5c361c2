"""Whether a graph without its weights gets through its first steps: what no kernel says before it runs."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.errors import ModelInterfaceError
from dlo_export.runtimes.onnxruntime.machine_faults import check_machine
from dlo_export.runtimes.onnxruntime.session import tensor_specs

_STEPS = (2, 1)  # tokens: a prompt, and one behind it
_MOST_WEIGHTS = 2**28  # as many as fit into 1 GiB of float32, which kernels for a CPU make of narrower types


def why_no_step(session: ort.InferenceSession, name: str) -> str | None:
    """What ONNX Runtime says where a prompt, or a token behind it, fails; None where both run, or cannot be tried.

    Weights are zeros that nobody has written, which the system keeps no memory for. Their numbers mean nothing and
    their sizes everything: of attention, masks and rotary tables these show in a step alone. What routers of zeros
    skip is not looked into.

    Args:
        session: On the CPU, of a decoder with a growing cache whose weights are inputs.
        name: Of the graph, for messages.
    """
    inputs, outputs = tensor_specs(session.get_inputs()), tensor_specs(session.get_outputs())
    weights = _zeros([spec for spec in inputs if not names.is_interface_name(spec.name)])
    decoder = [spec for spec in inputs if names.is_interface_name(spec.name)]
    if weights is None or not all(map(_is_of_any_length, decoder)):
        return None
    interface = DecoderInterface.of(decoder, outputs, name, cache="growing")
    batch = next((spec.shape[0] for spec in decoder if isinstance(spec.shape[0], int)), 1)
    try:
        shapes = interface.state_shapes(max(1, batch))
    except ModelInterfaceError as err:
        return err.message
    states = {key: np.zeros(shape, interface.element_type(key).numpy) for key, shape in shapes.items()}
    past, made = 0, [spec.name for spec in outputs]
    for tokens in _STEPS:
        step = np.arange(past, past + tokens)[np.newaxis].repeat(max(1, batch), 0)
        given = {
            names.INPUT_IDS: np.zeros_like(step),
            names.ATTENTION_MASK: np.ones((len(step), past + tokens), np.int64),
            names.POSITION_IDS: step,
        }
        try:
            results = session.run(made, {**weights, **states, **{key: given[key] for key in interface.step_inputs}})
        except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
            check_machine(name, err)
            return f"{tokens} tokens behind {past}: {err}"
        found = dict(zip(made, results, strict=True))
        states = {key: found[interface.present_of[key]] for key in states}
        past += tokens
    return None


def _zeros(weights: list[TensorSpec]) -> dict[str, np.ndarray] | None:
    """By name; None where NumPy has no such type, or there are too many."""
    found = {}
    for spec in weights:
        sizes = [size for size in spec.shape if isinstance(size, int)]
        if spec.element_type is None or len(sizes) != len(spec.shape):
            return None
        found[spec.name] = (sizes, spec.element_type)
    if sum(math.prod(sizes) for sizes, _ in found.values()) > _MOST_WEIGHTS:
        return None
    return {name: np.zeros(sizes, kind.numpy) for name, (sizes, kind) in found.items()}


def _is_of_any_length(spec: TensorSpec) -> bool:
    """Whether tokens, past ones too, may be as many as one likes, and all else is said."""
    heads = (1, 3) if names.parse_past(spec.name) is not None else ()
    return all(isinstance(size, int) == (axis in heads) for axis, size in enumerate(spec.shape) if axis)
