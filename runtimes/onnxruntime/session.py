"""An ONNX Runtime session of a decoder: loaded with our options, on the provider asked for, its errors in our words."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints.interface import LEFT_PADDING
from dlo_export.plugins.ort_registration import register_library
from dlo_export.runtimes.decoder_interface import CacheKind, DecoderInterface, TensorSpec
from dlo_export.runtimes.errors import ModelLoadError, ProviderUnavailableError, StepError
from dlo_export.runtimes.memory import check_memory
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory
from dlo_export.runtimes.onnxruntime.machine_faults import NOT_STARTED_HINT, check_machine
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.step_outputs import StepOutputs

_FATAL = 4  # the log level above errors


class SessionArguments(TypedDict, total=False):
    """How a session runs; what every ONNX Runtime runner takes.

    Attributes:
        weights_folder: Of a serialized model's external data.
        threads: Of one operator; None leaves it to ONNX Runtime.
        allow_spinning: Let idle threads spin, as they do unless told otherwise: faster alone, but several sessions in
            one process disturb each other.
        provider: The execution provider, CPU unless given; it must be there, and it is what runs.
        options: Session options to start from.
        placement: Remember which provider each node was given to.
        plugin_library: libdlo_ort.so, for graphs with dlo operators.
        exact_products: What a DequantizeLinear feeds multiplies in the graph's own type; by default ONNX Runtime fuses
            the two, and rounds the other factor to 8 bits.
    """

    weights_folder: str | Path | None
    threads: int | None
    allow_spinning: bool
    provider: Provider
    options: ort.SessionOptions | None
    placement: bool
    plugin_library: Path | None
    exact_products: bool


class DecoderSession:
    """An open session.

    Args:
        model: A .onnx file, or a serialized model.
        name: Of the model, for messages.
        cache: What the graph's cache must be.
        arguments: How it runs.

    Attributes:
        interface: Its inputs and outputs.
        provider: What runs it.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here.
        ProviderUnavailableError: The provider is not there, or does not start.
        BackendUnavailableError: It has no memory left, or CUDA failed.
        ModelInterfaceError: It is no decoder with such a cache.
        dlo_export.plugins.errors.PluginLibraryError: The plugin library cannot be used.
    """

    def __init__(self, model: str | Path | bytes, name: str, cache: CacheKind, arguments: SessionArguments) -> None:
        self._name = name
        self.provider = arguments.get("provider", CPU)
        options = _options(arguments)
        if cache == "growing":  # every decode step has new shapes: memory planned for them is planned for no other step
            options.enable_mem_pattern = False
        self._session = _open(model, name, options, self.provider)
        specs = (tensor_specs(self._session.get_inputs()), tensor_specs(self._session.get_outputs()))
        self.interface = DecoderInterface.of(*specs, name, cache=cache)

    @property
    def takes_padding(self) -> bool:
        """What the graph's metadata say; graphs that say nothing take it."""
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return metadata.get(LEFT_PADDING) != "no"

    def memory(self) -> DeviceMemory:
        """Memory where it computes, none reserved yet."""
        return DeviceMemory(self._session, self.provider)

    def check_room(self, batch: int) -> None:
        """Refuses states that the host's memory does not hold; a GPU's says so where they are allocated.

        Raises:
            BackendUnavailableError: So.
        """
        if self.provider.device == CPU.device:
            check_memory(sum(self.interface.state_bytes(batch).values()))

    def step_outputs(self) -> StepOutputs:
        """What binds and reads the outputs of its steps."""
        return StepOutputs(self.interface, self.memory if self.provider.reads_back else None)

    def placement(self) -> dict[str, list[tuple[str, str]]]:
        """By execution provider, name and operator of the nodes it was given.

        The session must have been asked to remember it: `placement` in its arguments. Copies between providers, which
        come later, are not among them.
        """
        placed: dict[str, list[tuple[str, str]]] = {}
        for subgraph in self._session.get_provider_graph_assignment_info():
            nodes = placed.setdefault(subgraph.ep_name, [])
            nodes += [(node.name, f"{node.domain}::{node.op_type}".removeprefix("::")) for node in subgraph.get_nodes()]
        return placed

    def binding(self) -> ort.IOBinding:
        """An empty binding of inputs and outputs for one run."""
        return self._session.io_binding()

    def run(self, binding: ort.IOBinding, graph: int | None = None) -> None:
        """Runs what is bound.

        Args:
            binding: It.
            graph: Where the provider captures CUDA graphs, the number of this binding's, captured with its first run
                and replayed from then on; None: this run is neither.

        Raises:
            StepError: ONNX Runtime failed.
        """
        options = None
        if self.provider.captures:
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(-1 if graph is None else graph))
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
            check_machine(self._name, err)
            raise StepError(f"{self._name}: ONNX Runtime failed: {err}", hint="a kernel refused the step") from err


def model_name(model: str | Path | bytes) -> str:
    """A name for reports."""
    return "model" if isinstance(model, bytes) else Path(model).name


def open_session(model: str | Path | bytes, name: str, arguments: SessionArguments) -> ort.InferenceSession:
    """A session of any graph, with our options, on the provider asked for.

    Args:
        model: A .onnx file, or a serialized model.
        name: Of the model, for messages.
        arguments: How it runs.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here.
        ProviderUnavailableError: The provider is not there, or does not start.
        BackendUnavailableError: It has no memory left, or CUDA failed.
    """
    return _open(model, name, _options(arguments), arguments.get("provider", CPU))


def _options(arguments: SessionArguments) -> ort.SessionOptions:
    options = arguments.get("options") or ort.SessionOptions()
    # Warnings of ONNX Runtime's own passes are not for users, its errors are raised: their text stands in ours.
    options.log_severity_level = _FATAL
    if (threads := arguments.get("threads")) is not None:
        options.intra_op_num_threads = threads
    spinning = "1" if arguments.get("allow_spinning", True) else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    if (folder := arguments.get("weights_folder")) is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(Path(folder).absolute())
        )
    if arguments.get("exact_products", False):
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if arguments.get("placement", False):
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if (library := arguments.get("plugin_library")) is not None:
        register_library(options, library)
    return options


def _open(
    model: str | Path | bytes, name: str, options: ort.SessionOptions, provider: Provider
) -> ort.InferenceSession:
    """A session on exactly the given provider (ONNX Runtime adds the CPU behind every other one)."""
    provider.check_here()
    if provider.device != CPU.device:
        _check_start(provider, name)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelLoadError(f"{model}: no such file, expected an ONNX model", hint="give a .onnx file that exists")
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[provider.name],
            provider_options=[dict(provider.options)],
            enable_fallback=0,  # to the CPU, with a message on stdout and the reason lost
        )
    except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
        check_machine(name, err)
        linked = "escapes model directory" in str(err)
        raise ModelLoadError(
            f"{name}: ONNX Runtime {ort.__version__} cannot load it: {err}",
            hint="put the data file itself in the model's folder, in place of the link"
            if linked
            else "the file is damaged, its external data is missing, or it needs another ONNX Runtime",
        ) from err
    # A provider that fails to start is dropped silently, and the CPU takes over.
    if (running := session.get_providers()[0]) != provider.name:
        raise ProviderUnavailableError(
            f"{name}: ONNX Runtime dropped {provider.name} and would run on {running}",
            hint=NOT_STARTED_HINT,
        )
    known = session.get_provider_options()[provider.name]
    if unknown := sorted(provider.options.keys() - known.keys()):
        raise ModelLoadError(
            f"{name}: {provider.name} has no options {unknown}", hint=f"it has {', '.join(sorted(known)) or 'none'}"
        )
    return session


def _check_start(provider: Provider, name: str) -> None:
    """Has a provider allocate a byte: whether it starts shows there, before a model's own faults can hide it.

    Raises:
        ProviderUnavailableError: It does not.
    """
    # What is wrong is raised, or asked for here: its log would say it again, on the user's screen.
    ort.set_default_logger_severity(_FATAL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # stdout is for data
        ort.preload_dlls()  # CUDA's libraries, where they are Python packages
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, provider.device, provider.device_id)
    except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
        reason = str(err).strip().rsplit("() ", 1)[-1]  # without the place in ONNX Runtime's source
        if missing := re.findall(r"Failed to load (\S+):", said.getvalue()):
            reason += f"; {', '.join(missing)} do not load"
        raise ProviderUnavailableError(
            f"{name}: {provider.name} does not start here: {reason}", hint=NOT_STARTED_HINT
        ) from err


def tensor_specs(arguments: Sequence[ort.NodeArg]) -> list[TensorSpec]:
    """What a session says of its inputs or outputs."""
    return [
        TensorSpec(argument.name, argument.type.removeprefix("tensor(").removesuffix(")"), tuple(argument.shape))
        for argument in arguments
    ]
