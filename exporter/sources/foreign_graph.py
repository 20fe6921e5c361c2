"""A Llama graph that another exporter wrote."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import InjectedLayer
from dlo_export.checkpoints.config import LlamaConfig, RoutingConfig
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.files.file_digest import known_sha256
from dlo_export.checkpoints.files.file_inside import file_inside
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.finite_weights import finite_tensors
from dlo_export.checkpoints.formats.huggingface_folder import FolderTokenizer
from dlo_export.checkpoints.lazy_tensors import LazyTensor, are_equal
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD
from dlo_export.exporter.genai_config import GENAI_CONFIG_NAME, check_genai_config
from dlo_export.exporter.pipeline import prepare_foreign
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.sources.base_model import Refusal, Use, check_use
from dlo_export.exporter.sources.foreign_checks import (
    check_config_fits,
    check_one_mlp_a_layer,
    check_token_inputs,
    check_tokens_stand_alone,
)
from dlo_export.exporter.sources.foreign_file import ForeignFile, read_foreign_file
from dlo_export.exporter.sources.foreign_weights import is_quantised, named_weights, why_unnamed
from dlo_export.exporter.sources.graph_types import infer_types
from dlo_export.exporter.sources.vendor_nodes import check_vendor_nodes, check_vendor_types
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers


@dataclasses.dataclass(frozen=True)
class ForeignGraph:
    """A `.onnx` file whose decoder layers were found, answering as a `BaseModel`.

    It keeps its dtype, its attention and its cache: what is injected and routed adapts to them. TensorRT takes neither
    such attention nor such a cache: for engines it is read as a checkpoint, its weights by what they feed, and what no
    weight says (rope, epsilon, heads) from the config.json beside it. Parity compares the two.

    Attributes:
        path: The file.
        config: From the config.json beside it; None where there is none.
        allow_nonfinite: Let weights be NaN or infinite.
    """

    path: Path
    config: LlamaConfig | None
    allow_nonfinite: bool = False

    @property
    def kind(self) -> str:  # noqa: D102 - BaseModel's questions, here and below
        return "onnx"

    @functools.cached_property
    def stored_dtype(self) -> str:
        """The type of most of the weights' bytes; KV cache and logits may be of another."""
        sizes: collections.Counter[str] = collections.Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype.name] += math.prod(tensor.shape) * tensor.dtype.itemsize
        return sizes.most_common(1)[0][0]

    @property
    def injected_layers(self) -> tuple[InjectedLayer, ...]:
        """None: a graph does not tell how its layers came to be."""
        return ()

    @property
    def routing(self) -> RoutingConfig | None:
        """None: of routers in a graph nothing is known."""
        return None

    @property
    def lora(self) -> None:
        """None: LoRA is merged into checkpoints."""

    @property
    def packs_weights(self) -> bool:
        """No: what is not touched stays as it is."""
        return False

    @property
    def is_built_here(self) -> bool:
        """No: whoever wrote it may have written what nothing runs."""
        return False

    @functools.cached_property
    def client_settings(self) -> Mapping[str, Any] | None:
        """The genai_config.json beside the graph, where it is about this graph.

        Raises:
            CheckpointError: It is no JSON object, of another model, or holds something else where objects are changed.
        """
        path = _beside(self.path, GENAI_CONFIG_NAME)
        if path is None:
            return None
        settings = read_json(path)
        decoder = settings.get("model", {}).get("decoder", {}) if isinstance(settings.get("model"), dict) else {}
        if not isinstance(decoder, dict) or decoder.get("filename") != self.path.name:
            return None  # of a pipeline of several graphs, or of the graph beside this one
        if (layers := decoder.get("num_hidden_layers")) != self.num_layers:
            raise CheckpointError(
                f"{path}: model.decoder.num_hidden_layers is {layers}, {self.path.name} has {self.num_layers} layers",
                hint="put the genai_config.json of the exported model beside the graph, or take it away",
            )
        check_genai_config(settings, path)
        return settings

    def graph_dtype(self, choice: str, provider: ProviderOption = "cpu") -> str:
        """Its own.

        Raises:
            InputError: Another one is asked for, or its weights are of none that this project exports.
        """
        own = next((kind.option for kind in FLOATS if kind.name == self.stored_dtype), None)
        if own is None:
            raise InputError(
                f"{self.path}: most of its weights are {self.stored_dtype}, expected "
                f"{', '.join(kind.name for kind in FLOATS)}",
                hint="export the checkpoint instead",
            )
        if choice not in ("auto", own):
            raise InputError(
                f"{self.path}: --dtype {choice} asks for a cast, but a graph keeps its own dtype, {own}",
                hint="export the checkpoint instead, or leave --dtype out",
            )
        return own

    def why_not(self, use: Use) -> Refusal | None:
        """A graph has its own attention and cache, and may lie without a config.json."""
        match use:
            case "export without adapter":
                return Refusal(
                    "is an ONNX graph and no adapter was given, so there is nothing to inject or route",
                    "add --adapter DIR, as `dlo expand --adapter` or `dlo calibrate` write it, or --trt for engines",
                )
            case "calibration":
                return Refusal(
                    "is a graph, routers are fitted to a checkpoint",
                    "calibrate the checkpoint with --as-adapter, then export the graph with that adapter",
                )
            case "training":
                return Refusal("is a graph, which does not learn", "train the checkpoint it was exported from")
            case "TensorRT":
                return self._why_no_checkpoint()
            case "injection" | "parity":
                unnamed = self._why_unnamed()
                return unnamed if use == "injection" or unnamed is not None else self._why_no_pytorch()
            case _:
                return None

    def _why_no_pytorch(self) -> Refusal | None:
        if self.config is None:
            return Refusal(
                "no config.json lies beside the graph, so there is no PyTorch model of it",
                "put the config.json of the exported model beside the graph",
            )
        if not any(map(is_quantised, self.tensors.values())):
            return None
        return Refusal(
            "its weights are quantised, which PyTorch does not compute with as ONNX Runtime does",
            "compare it with its own masked form, as the export does",
        )

    def _why_no_checkpoint(self) -> Refusal | None:
        """Why the decoder cannot be built anew from its weights and its config.json."""
        if (unnamed := self._why_unnamed()) is not None:
            return unnamed._replace(hint="export the checkpoint with --trt")
        if self.config is None:
            return Refusal(
                "no config.json lies beside the graph, which says what engines need and no weight tells (rope, "
                "epsilon, heads)",
                "put the config.json of the exported model beside the graph, or export the checkpoint with --trt",
            )
        missing = sorted(self.config.tensor_shapes().keys() - self.tensors.keys())
        if not missing:
            return None
        return Refusal(
            f"holds no {', '.join(missing[:3])} where a {self.config.model_type} has it, so no engine can be built of "
            "its weights",
            "put the config.json of the exported model beside the graph, or export the checkpoint with --trt",
        )

    @property
    def dtype_beside_engines(self) -> str:
        """Its own: the graph stays what it is."""
        return self.graph_dtype("auto")

    def engine_model(self, dtype: ir.DataType) -> ir.Model:
        """The plain graph of its configuration on its weights, dequantised where they are quantised."""
        check_use(self, "TensorRT")
        assert self.config is not None, "or it would have refused"
        config = dataclasses.replace(self.config, tie_word_embeddings=HEAD not in self.tensors)
        # Nobody else looks at them: what is written of the graph itself is looked at there.
        tensors = self.tensors if self.allow_nonfinite else finite_tensors(self.tensors, self.path)
        return plain_graph(config, tensors, dtype)

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        """As it was exported, its layers findable: `dtype` is its own already (`graph_dtype`)."""
        return read_prepared(self.path).model

    def check(self) -> None:
        """Refuses what cannot be exported, before anything is made of it.

        Raises:
            InputError: It is routed already, counts its tokens in another type than the interface's, rounds tokens
                together, or has experts.
            CheckpointError: The config.json beside it is of another model.
        """
        check_token_inputs(self.path, self._file.model.graph)
        routed = self._file.routed or (self.config is not None and self.config.routing is not None)
        if routed:
            raise InputError(
                f"{self.path}: its layers have routers already, and an adapter's would be added to them",
                hint="give the model it was made from, a checkpoint or a graph, and the adapter",
            )
        check_tokens_stand_alone(self.path, self._layers)
        check_one_mlp_a_layer(self.path, self._layers)
        _ = self.client_settings  # refused before the work, if it is
        if self.config is not None:
            check_config_fits(self.path, self.config, self._layers, self.tensor_shapes())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What stands beside the graph and is not taken over as it is, for the user to be shown."""
        return tuple(self._tokenizer.warnings)

    @functools.cached_property
    def _tokenizer(self) -> FolderTokenizer:
        return FolderTokenizer(self.path.parent, None if self.config is None else self.config.vocab_size)

    @functools.cached_property
    def _layers(self) -> tuple[DecoderLayer, ...]:
        return find_decoder_layers(self._file.model.graph)

    def _why_unnamed(self) -> Refusal | None:
        unnamed = next((said for layer in self._layers if (said := why_unnamed(layer)) is not None), None)
        if unnamed is None:
            return None
        return Refusal(
            f"weights of its layers have no names: {unnamed}",
            "route it: masking and skipping MLPs needs none; or inject into the checkpoint, and export that",
        )

    @functools.cached_property
    def _file(self) -> ForeignFile:
        return read_prepared(self.path)

    @property
    def num_layers(self) -> int:
        """Decoder layers found."""
        return len(self._layers)

    @functools.cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """The graph's weights under Hugging Face names, in Hugging Face orientation.

        Those of layers that hold other weights besides, such as norms of queries, are left out: MLPs are masked and
        skipped without them, and whoever needs them says why they are not there.
        """
        named = named_weights(self._layers)
        head = named.get(HEAD)
        # Some exporters store a tied matrix twice; quantised, the two may be rounded apart, and both count.
        tied = self.config is not None and self.config.tie_word_embeddings
        if tied and head is not None and not (is_quantised(head) or is_quantised(named[EMBEDDING])):
            if not are_equal(head, named[EMBEDDING]):
                raise CheckpointError(
                    f"{self.path}: head and embedding differ, but config.json says tie_word_embeddings",
                    hint="put the config.json of the exported model beside the graph",
                )
            del named[HEAD]
        return named

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `tensors`."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def sha256(self) -> str:
        """SHA-256 over the graph file and its external data files, in the order of their names."""
        digest = hashlib.sha256()
        for file in (self.path, *self.data_files):
            digest.update(bytes.fromhex(known_sha256(file)))
        return digest.hexdigest()

    @property
    def data_files(self) -> Mapping[Path, str]:
        """Where its external data lie, links followed: paths relative to its folder, in their order."""
        return self._file.data_files

    def save_companions(self, folder: Path, config_overrides: Mapping[str, Any] | None = None) -> None:
        """Writes config.json with the overrides, and copies what else stands beside the graph."""
        if self.config is not None:
            save_json(folder / "config.json", {**self.config.raw, **(config_overrides or {})})
        generation_config = _beside(self.path, "generation_config.json")
        if generation_config is not None:
            shutil.copyfile(generation_config, folder / generation_config.name)
        self._tokenizer.save(folder)

    def close(self) -> None:
        """Nothing to unmap: onnx_ir releases its files with the model."""


def open_foreign_graph(path: Path, *, allow_nonfinite: bool = False) -> ForeignGraph:
    """Opens someone else's Llama graph.

    Args:
        path: The file.
        allow_nonfinite: Let weights be NaN or infinite.

    Raises:
        InputError: There is no such file, it is no ONNX model, or an external data file is missing or too short.
        CheckpointError: The config.json beside it is not a supported Llama's.
        dlo_export.graph_passes.errors.DecoderLayersNotFound: The graph is no decoder with a KV cache.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="give the .onnx file itself, or a checkpoint folder")
    config_path = _beside(path, "config.json")
    config = None if config_path is None else LlamaConfig.from_json(config_path)
    graph = ForeignGraph(path, config, allow_nonfinite)
    graph.check()
    return graph


def read_prepared(path: Path, *, for_inspection: bool = False) -> ForeignFile:
    """Reads a graph of unknown origin, checks it, and makes its layers findable.

    Args:
        path: The file.
        for_inspection: As for `read_foreign_file`.

    Raises:
        InputError: It is no valid ONNX model, with all places.
    """
    file = read_foreign_file(path, for_inspection=for_inspection)
    try:
        check_vendor_nodes(file.model, for_inspection=for_inspection)
        prepare_foreign(file.model)
        infer_types(file.model)
        check_vendor_types(file.model)
    except GraphPassError as err:
        raise InputError(f"{path}: {err.message}", hint=err.hint) from err
    return file


def _beside(path: Path, name: str) -> Path | None:
    """A file in the graph's folder, None where there is none.

    Raises:
        CheckpointError: It is a link that leads out of the folder or nowhere, or no regular file.
    """
    return file_inside(path.parent, name) if os.path.lexists(path.parent / name) else None
