"""Which profile a step runs in, and how much memory every tensor of an engine takes: arithmetic, no GPU needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dlo_export.checkpoints.dtypes import BY_ONNX
from dlo_export.checkpoints.interface import INPUT_IDS
from dlo_export.runtimes.artefact.engine_record import EngineRecord, OptimizationProfile, Shape
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.errors import ModelInterfaceError, StepError


@dataclasses.dataclass(frozen=True)
class ProfileChoice:
    """A profile of one of a model's engines.

    Attributes:
        engine: Index of the engine.
        index: Of the profile, in that engine.
        profile: Its shapes.
    """

    engine: int
    index: int
    profile: OptimizationProfile

    @property
    def least(self) -> Shape:
        """Of input_ids: (batch, sequence)."""
        return self.profile.shapes[INPUT_IDS][0]

    @property
    def largest(self) -> Shape:
        """Of input_ids: (batch, sequence)."""
        return self.profile.shapes[INPUT_IDS][2]

    def covers(self, batch: int, sequence: int) -> bool:
        """Whether a step of that shape may run in it."""
        return all(
            low <= size <= high for low, size, high in zip(self.least, (batch, sequence), self.largest, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Device memory of one input or output.

    Attributes:
        name: Of the tensor.
        dtype: As in TensorSpec.
        bytes: At the largest shape; 0 for an alias.
        alias_of: The input whose memory it shares: a cache is updated in place.
    """

    name: str
    dtype: str
    bytes: int
    alias_of: str | None = None


def profiles_of(engines: Sequence[EngineRecord]) -> tuple[ProfileChoice, ...]:
    """All profiles of a model's engines."""
    return tuple(
        ProfileChoice(engine, index, profile)
        for engine, record in enumerate(engines)
        for index, profile in enumerate(record.profiles)
    )


def choose_profile(profiles: Sequence[ProfileChoice], batch: int, sequence: int, name: str) -> ProfileChoice:
    """The tightest profile that covers a step: what was tuned for single tokens runs them.

    Args:
        profiles: Of all engines of the model.
        batch: Sequences.
        sequence: Tokens of the step.
        name: Of the runner, for messages.

    Raises:
        StepError: None covers it.
    """
    fitting = [choice for choice in profiles if choice.covers(batch, sequence)]
    if not fitting:
        known = ", ".join(f"{c.profile.name} {list(c.least)} to {list(c.largest)}" for c in profiles)
        raise StepError(
            f"{name}: no profile covers a step of [batch, sequence] = [{batch}, {sequence}]; the engine has {known}",
            hint=f"export with --trt-max-batch {batch} and --trt-max-sequence {sequence} or more",
        )
    return min(fitting, key=lambda choice: math.prod(choice.largest))


def step_shape(spec: TensorSpec, batch: int, sequence: int) -> Shape:
    """A tensor's shape in one step.

    Args:
        spec: Its sizes are numbers, "batch" or "sequence".
        batch: Sequences.
        sequence: Tokens of the step.

    Raises:
        ModelInterfaceError: A size has another name.
    """
    known = {"batch": batch, "sequence": sequence}
    sizes = [size if isinstance(size, int) else known.get(str(size)) for size in spec.shape]
    if None in sizes:
        raise ModelInterfaceError(
            f"{spec.name} has shape {list(spec.shape)}, expected numbers, 'batch' and 'sequence' only",
            hint="export again with --trt",
        )
    return tuple(size for size in sizes if size is not None)


def plan_buffers(interface: DecoderInterface, max_batch: int, max_sequence: int) -> dict[str, Buffer]:
    """Memory for every input and output, once for all steps.

    Args:
        interface: Of the engine; of both, where prefill and decode are split.
        max_batch: Sequences of the largest profile.
        max_sequence: Tokens of one step in the largest profile.
    """
    past_of = {present: past for past, present in interface.present_of.items()}
    plan = {}
    for name, spec in (interface.inputs | interface.outputs).items():
        elements = math.prod(step_shape(spec, max_batch, max_sequence))
        alias = past_of.get(name)
        plan[name] = Buffer(name, spec.dtype, 0 if alias else elements * BY_ONNX[spec.dtype].itemsize, alias)
    return plan
