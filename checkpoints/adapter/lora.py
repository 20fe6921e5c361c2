"""LoRA adapters as PEFT saves them, merged into a model's weights while those are read.

A folder of ``adapter_config.json`` and ``adapter_model.safetensors``. For a projection W [out, in] it holds A [r, in]
and B [out, r]; the merged weight is W + s·B·A, where s is ``lora_alpha`` / r, or ``lora_alpha`` / √r with
``use_rslora``. What ``modules_to_save`` and ``bias`` trained stands in it whole, and takes the base's place.

Sources: LoRA (arXiv 2106.09685), rank-stabilised LoRA (arXiv 2312.03732), PEFT's ``tuners/lora``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.checkpoints.adapter.adapter import CONFIG_NAME, AdapterError
from dlo_export.checkpoints.dtypes import BY_NUMPY, FLOATS
from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.checkpoints.files.file_inside import file_inside
from dlo_export.checkpoints.files.json_fields import is_positive
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.finite_weights import finite_tensors
from dlo_export.checkpoints.formats.safetensors_reader import tensors_of_safetensors
from dlo_export.checkpoints.formats.safetensors_writer import save_safetensors
from dlo_export.checkpoints.lazy_tensors import LazyTensor, TensorOfRows
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD, LLAMA_LAYER, parse_layer_tensor

TENSORS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
# How A and B were started, where the base's weights stay as they are. pissa, olora and others take a part of W away.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Fields that say how it was trained, or that are read here.
_READ_OR_HARMLESS = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying"),
}
_UNMERGED_HINT = "merge it with PEFT's merge_and_unload, save the model, and export that"


@dataclass(frozen=True)
class LoraFactors:
    """What is added to one projection: scale · B · A.

    Attributes:
        a: [r, in].
        b: [out, r].
        scale: Their product's.
    """

    a: LazyTensor
    b: LazyTensor
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter, checked but not yet against a model.

    Attributes:
        path: Its folder.
        factors: By the Hugging Face name of the weight they are added to.
        replaced: Tensors that take the base's place, by Hugging Face name.
    """

    path: Path
    factors: Mapping[str, LoraFactors]
    replaced: Mapping[str, LazyTensor]

    def check_fits(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Checks the adapter against the model it is to be merged into.

        Args:
            tensors: The base model's, by Hugging Face name.

        Raises:
            AdapterError: It was made for another model; all problems are listed.
        """
        if problems := [*self._misfits(tensors)]:
            raise AdapterError(
                f"adapter {self.path} does not fit the model: {'; '.join(problems)}",
                hint="use the model it was trained on; where embeddings were resized, merge with PEFT and export that",
            )

    def merged(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The model's tensors with the adapter's changes, computed when they are read.

        Args:
            tensors: The base model's, by Hugging Face name, which it fits.
        """
        merged: dict[str, LazyTensor] = {**tensors, **self._replaced_in(tensors)}
        for name, factors in self.factors.items():
            merged[name] = MergedTensor(merged[name], factors)
        return merged

    def sha256(self) -> str:
        """Of its weights file."""
        return file_sha256(self.path / TENSORS_NAME)

    def _replaced_in(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """What takes a place in the model: of a tied one, which has one matrix, not the second copy of it."""
        return {name: tensor for name, tensor in self.replaced.items() if name != HEAD or HEAD in tensors}

    def _is_untied(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether the head of a tied model would be another matrix than its embedding.

        PEFT trains copies: of both, and the same one for both only where it was asked to (`ensure_weight_tying`).
        """
        if HEAD in tensors or not self.replaced.keys() & {EMBEDDING, HEAD}:
            return False
        embedding, head = self.replaced.get(EMBEDDING), self.replaced.get(HEAD)
        return embedding is None or head is None or not np.array_equal(embedding.numpy(), head.numpy())

    def _misfits(self, tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
        if self._is_untied(tensors):
            yield f"{EMBEDDING} and {HEAD} are one matrix in the model, and were not trained as one"
        for name, factors in self.factors.items():
            shape = (factors.b.shape[0], factors.a.shape[1])
            if name not in tensors:
                yield f"{name} is not in the model"
            elif tensors[name].shape != shape:
                yield f"{name}: B·A is {list(shape)}, the model's is {list(tensors[name].shape)}"
        for name, tensor in self._replaced_in(tensors).items():
            if name not in tensors:
                yield f"{name} is not in the model"
            elif tensors[name].shape != tensor.shape:
                yield f"{name} is {list(tensor.shape)}, the model's is {list(tensors[name].shape)}"


class MergedTensor(TensorOfRows):
    """W + scale · B · A, in float32, rows computed when they are read.

    Args:
        base: W, [out, in].
        factors: A and B; they are small, and stay in memory.
    """

    def __init__(self, base: LazyTensor, factors: LoraFactors) -> None:
        self._base = base
        self._factors = factors
        self._read: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self._base.shape

    @property
    def dtype(self) -> np.dtype:
        """float32: a small change of a 16-bit weight would be rounded away."""
        return np.dtype(np.float32)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`."""
        if self._read is None:
            a, b = self._factors.a.numpy().astype(np.float32), self._factors.b.numpy().astype(np.float32)
            self._read = a, b * np.float32(self._factors.scale)
        a, scaled_b = self._read
        values: np.ndarray = scaled_b[start:stop] @ a
        values += self._base.rows(start, stop)
        return values

    def release(self) -> None:
        """Gives back the base's pages."""
        self._base.release()


def is_peft_adapter(folder: Path) -> bool:
    """Whether a folder's adapter_config.json is one of PEFT's, of any kind."""
    path = folder / CONFIG_NAME
    return path.is_file() and "peft_type" in read_json(path, AdapterError)


def load_lora(folder: Path, *, allow_nonfinite: bool = False) -> LoraAdapter:
    """Opens a LoRA adapter; values are read when asked for.

    Args:
        folder: As PEFT saved it.
        allow_nonfinite: Let weights be NaN or infinite.

    Raises:
        AdapterError: It is damaged, or of a kind that cannot be merged, with all reasons.
        CheckpointError: A file is a link that leads out of the folder.
    """
    file_inside(folder, CONFIG_NAME)
    config = read_json(folder / CONFIG_NAME, AdapterError)
    if problems := [*_config_problems(config)]:
        raise AdapterError(f"adapter {folder}: {'; '.join(problems)}", hint=_UNMERGED_HINT)
    if not (folder / TENSORS_NAME).is_file():
        raise AdapterError(
            f"adapter {folder}: {TENSORS_NAME} not found", hint="pickles are not read: save it again as safetensors"
        )
    file_inside(folder, TENSORS_NAME)
    stored: Mapping[str, LazyTensor] = tensors_of_safetensors(MappedFile(folder / TENSORS_NAME))
    if not allow_nonfinite:
        stored = finite_tensors(stored, folder)
    tensors: dict[str, LazyTensor] = {}
    problems = [] if stored else [f"{TENSORS_NAME} holds no tensors"]
    for name, tensor in stored.items():
        own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if own in tensors:
            problems.append(f"{own} is stored twice, once as {name}")
        tensors[own] = tensor
    problems += _tensor_problems(tensors)
    factors: dict[str, LoraFactors] = {}
    for name, a in tensors.items():
        if (match := _FACTOR.fullmatch(name)) is None or match[2] == "B" or problems:
            continue
        module, b = match[1], tensors[f"{match[1]}.lora_B.weight"]
        rank = _of_module(config.get("rank_pattern"), module, config["r"])
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
            problems.append(f"{module}: A is {list(a.shape)} and B {list(b.shape)}, expected rank {rank}")
        else:
            factors[f"{module}.weight"] = LoraFactors(a, b, _scale(config, module, a.shape[0]))
    if problems:
        raise AdapterError(f"adapter {folder}: {'; '.join(problems)}", hint=_UNMERGED_HINT)
    replaced = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    return LoraAdapter(folder, factors, replaced)


def save_lora(factors: Mapping[str, LoraFactors], folder: Path) -> None:
    """Writes a LoRA adapter as PEFT does, so that both it and `load_lora` open it.

    Args:
        factors: By the Hugging Face name of the weight they are added to; all of one rank and scale.
        folder: New.

    Raises:
        OSError: It cannot be written.
    """
    modules = {name.removesuffix(".weight") for name in factors}
    (rank,), (scale,) = ({each.a.shape[0] for each in factors.values()}, {each.scale for each in factors.values()})
    tensors = {
        f"{_PREFIX}{name.removesuffix('.weight')}.lora_{kind}.weight": tensor
        for name, each in factors.items()
        for kind, tensor in (("A", each.a), ("B", each.b))
    }
    folder.mkdir()
    save_safetensors(tensors, folder / TENSORS_NAME)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "inference_mode": True,
    }
    save_json(folder / CONFIG_NAME, config)


def merged_sha256(base: str, lora: str) -> str:
    """Identity of weights with a LoRA adapter in them: SHA-256 of both hashes in hexadecimal, a line each."""
    return hashlib.sha256(f"{base}\n{lora}\n".encode()).hexdigest()


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why an adapter is none that a sum W + s·B·A can take in."""
    if (kind := config.get("peft_type")) != "LORA":
        yield f"is a PEFT adapter of kind {kind!r}, only LORA can be merged into the weights"
        return
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        yield f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base's weights too"
    if config.get("use_dora"):
        yield "use_dora is true: DoRA rescales the merged weight"
    known = _READ_OR_HARMLESS | {"use_dora"}
    yield from (f"{key} is set, which is no plain LoRA" for key in config if key not in known and config[key])
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not is_positive(value):
            yield f"{key} is {value!r}, expected a number above 0"
    for key in ("rank_pattern", "alpha_pattern"):
        entries = config.get(key) or {}
        if not isinstance(entries, dict) or not all(map(is_positive, entries.values())):
            yield f"{key} is {entries!r}, expected numbers above 0 by module"
            continue
        for pattern in entries:
            try:
                re.compile(_at_the_end(pattern))
            except (re.error, OverflowError, RecursionError) as err:
                yield f"{key}: {pattern!r} is no pattern ({err})"


def _tensor_problems(tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if BY_NUMPY.get(tensor.dtype) not in FLOATS:
            yield f"{name}: found dtype {tensor.dtype.name}, expected one of {', '.join(kind.name for kind in FLOATS)}"
        if match is None:
            if "lora_" in name:
                yield f"{name} is no A or B of a projection"
            continue
        place = parse_layer_tensor(f"{match[1]}.weight")
        if place is None or len(LLAMA_LAYER.axes.get(place.tensor, ())) != 2:
            yield f"{match[1]} is adapted, only the projections of decoder layers can be"
        other = f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight"
        if other not in tensors:
            yield f"{other} is missing"


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor s of a module."""
    alpha = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_module(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    """A module's own value, where a pattern gives one."""
    given = (patterns or {}).items()
    return next((value for pattern, value in given if re.fullmatch(_at_the_end(pattern), module)), otherwise)


def _at_the_end(pattern: str) -> str:
    """The pattern of a module's whole name, of one (a regular expression) that it ends with."""
    return rf"(.*\.)?({pattern})"
