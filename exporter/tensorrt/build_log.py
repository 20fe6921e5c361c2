"""TensorRT's log: what it says of use to a user, without where in TensorRT's sources it said it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from dlo_export.exporter.tensorrt.nodes import decoder_layer
from dlo_export.runtimes.tensorrt.backend import Backend

# "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (text)" and "[file.cpp::function::9] Error Code …".
_ERROR_CODE = re.compile(r"^(?:\[[^\]]+\]|[\w:]+:)\s*Error Code \d+: (?P<kind>[^(]+?) \((?P<text>.*)\)\s*$", re.DOTALL)
_SOURCE = re.compile(r"\s*In \w+ at /_src/\S+?:\d+\)?")
_DECODER_NODE = re.compile(r"\bmodel\.(?:layers|routers)\.\d+[\w.]*")
_PARSING = re.compile(r"Parsing node: (?P<name>\S*) \[(?P<op>[^\]]+)\]")

_HINTS = (
    ("K exceeds the maximum value", "a TopK selects 3840 at most: lower --trt-max-batch or --trt-max-sequence"),
    ("dedicated kernel", "an attention was not marked decomposable; please report it with the graph"),
    ("FP32 GEMM is not supported", "Turing (sm75) cannot build what multiplies fp32 matrices: leave sm75 out"),
    ("HW-specific datatypes: b16", "Turing (sm75) has no bf16: use --dtype fp16, or leave sm75 out"),
    ("Plugin not found", "give the plugin library, or use --lowering compact or --lowering if, which need none"),
    ("same input types", "a strongly typed network casts nothing by itself: the graph needs a Cast there"),
    ("no optimization profile", "the graph has free axes: give at least one optimization profile"),
    ("creator && getPluginCreatorVersion", "this op needs a plugin of that name: choose a lowering without it"),
)


class BuildLog:
    """Takes TensorRT's messages.

    Args:
        backend: Who writes them.
        tell: Called with severity and text of every line that is not noise, but not of chatter.
        tell_doing: Called with what the importer is at.

    Attributes:
        errors: So far, each once, in order.
    """

    def __init__(self, backend: Backend, tell: Callable[[str, str], None], tell_doing: Callable[[str], None]) -> None:
        self.errors: list[str] = []
        self._backend, self._tell, self._tell_doing = backend, tell, tell_doing

    def take(self, severity: str, message: str) -> None:
        """One message; severity is "VERBOSE", "INFO", "WARNING", "ERROR" or "INTERNAL_ERROR"."""
        if severity == "VERBOSE":
            if parsing := _PARSING.search(message):
                self._tell_doing(f"parsing node '{parsing['name']}' ({parsing['op']})")
            return
        if self._backend.is_noise(message):
            return
        self._tell(severity, message.strip())
        if severity in ("ERROR", "INTERNAL_ERROR") and (text := without_source(message)) not in self.errors:
            self.errors.append(text)

    def logger(self, trt: Any) -> Any:
        """The object TensorRT writes to; it must outlive all of TensorRT's objects."""
        take = self.take

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                take(severity.name, message)

        return Logger()


def without_source(message: str) -> str:
    """An error without the names of TensorRT's functions and source files."""
    match = _ERROR_CODE.match(message.strip())
    text = message if match is None else f"{match['kind']}: {match['text']}"
    return _SOURCE.sub("", text).strip()


def parser_errors(backend: Backend, parser: Any) -> list[str]:
    """What the ONNX importer refused: node, op, decoder layer, reason."""
    sentences = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        lines = [line for line in error.desc().splitlines() if not backend.is_noise(line)]
        reason = " ".join(without_source(line) for line in lines if not line.startswith("Invalid Node - ")).strip()
        code = error.code().name.replace("_", " ").lower()
        # The importer's own checks answer "false" where they have nothing to add to the code.
        reason = code if reason in ("", "false") else f"{code}: {reason}"
        name, op_type = error.node_name(), error.node_operator()
        where = f"node '{name}' ({op_type}){_layer(name)}: " if op_type else ""
        sentences.append(f"{where}{reason}")
    return sentences


def builder_errors(log: Sequence[str]) -> list[str]:
    """What the builder logged, each line with the decoder layer of the node it names."""
    sentences = []
    for line in log:
        names = _DECODER_NODE.findall(line)
        index = decoder_layer(names[0]) if names else None
        sentences.append(line if index is None else f"{line} (decoder layer {index})")
    return sentences


def hint_for(errors: Sequence[str]) -> str:
    """What to do about the first error that is known; what to try otherwise."""
    for error in errors:
        for part, hint in _HINTS:
            if part in error:
                return hint
    if any("unsupported node" in error for error in errors):
        return "TensorRT does not have this op, or not in this form: use another lowering, or replace it in the graph"
    return "run again with -v for TensorRT's whole log"


def _layer(name: str) -> str:
    index = decoder_layer(name)
    return "" if index is None else f" of decoder layer {index}"
