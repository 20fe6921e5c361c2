"""An open Llama checkpoint, whatever it is stored in: a checked configuration and tensors under Hugging Face names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.dtypes import BY_NUMPY, FLOATS
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.lazy_tensors import AbsentTensor, LazyTensor, are_equal
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD

MAX_LISTED_PROBLEMS = 50


class StoredTensor(LazyTensor, Protocol):
    """A lazy tensor of which an error can say where it is."""

    @property
    def file(self) -> MappedFile:
        """Where it is stored."""


class Checkpoint:
    """An open checkpoint whose tensors were checked against its configuration. A context manager.

    Args:
        path: The folder or file.
        config: Its configuration.
        stored: What the files hold, by Hugging Face name. Rotary frequency buffers and the second copy of a tied head
            are dropped, everything else must be what the configuration expects.
        stored_dtype: See the attribute.
        kind: See the attribute.
        files: The mapped weights files, in the order of their names.
        save_tokenizer: Writes the tokenizer's files, and generation_config.json if there is one, to a folder.
        warnings: See the attribute.

    Attributes:
        kind: What the artefact's description calls its format: "checkpoint" in Hugging Face form, "gguf".
        stored_dtype: The type most of the weights' bytes are stored in: "float32", "float16", "bfloat16", or a GGUF
            quantisation such as "Q4_1".
        tensors: Exactly the tensors of `config.tensor_shapes()`, in its order.
        warnings: What the checkpoint has that is not taken over as it is, one sentence each, for the user to be shown.

    Raises:
        CheckpointError: Lists every missing, unexpected, wrongly shaped and non-float tensor.
    """

    def __init__(
        self,
        path: Path,
        config: LlamaConfig,
        stored: Mapping[str, StoredTensor | AbsentTensor],
        *,
        stored_dtype: str,
        kind: str = "checkpoint",
        files: Sequence[MappedFile],
        save_tokenizer: Callable[[Path], None],
        warnings: Sequence[str] = (),
    ) -> None:
        _check_tensors(path, config, stored, said_by="config.json" if kind == "checkpoint" else "its metadata")
        self.path = path
        self.kind = kind
        self.config = config
        self.warnings = tuple(warnings)
        self.stored_dtype = stored_dtype
        self.tensors: Mapping[str, LazyTensor] = {name: stored[name] for name in config.tensor_shapes()}
        self._files = tuple(files)
        self._save_tokenizer = save_tokenizer
        self._sha256: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files. Arrays handed out before stay valid; reading further tensors is an error."""
        for file in self._files:
            file.close()

    def sha256(self) -> str:
        """Identity of the weights: SHA-256 of the weights file, as `sha256sum model.safetensors` prints it.

        Of several shards: SHA-256 of what `sha256sum` prints for them, in the order of their names. The whole content
        is hashed, on first use, because two fine-tunes of one model differ in nothing else: 1.8 GB/s where the CPU has
        SHA instructions, a quarter of that elsewhere. Safe to call from a thread beside an export.
        """
        if self._sha256 is None:
            digests = [file_sha256(file.path) for file in self._files]
            listing = "".join(
                f"{digest}  {file.path.name}\n" for digest, file in zip(digests, self._files, strict=True)
            )
            self._sha256 = digests[0] if len(digests) == 1 else hashlib.sha256(listing.encode()).hexdigest()
        return self._sha256

    def save_companions(self, folder: Path, config_overrides: Mapping[str, Any] | None = None) -> None:
        """Writes config.json, generation_config.json and the tokenizer's files into an existing folder.

        Args:
            folder: Where to; files of these names are overwritten.
            config_overrides: Keys of config.json that differ in what is written, such as a deeper num_hidden_layers.

        Raises:
            CheckpointError: A file to be copied is not a regular file of the checkpoint.
        """
        values = {**self.config.raw, **(config_overrides or {})}
        # Training scripts save use_cache: false. What is written here has a cache, and none of anybody's Python code.
        values["use_cache"] = True
        values.pop("auto_map", None)
        save_json(folder / "config.json", values)
        save_json(folder / "generation_config.json", _generation_config(self.config))
        self._save_tokenizer(folder)


def _generation_config(config: LlamaConfig) -> dict[str, Any]:
    eos = config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id)
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    return {"_from_model_config": True, **{key: value for key, value in tokens.items() if value not in (None, [])}}


def _check_tensors(
    path: Path, config: LlamaConfig, stored: Mapping[str, StoredTensor | AbsentTensor], *, said_by: str
) -> None:
    expected = config.tensor_shapes()
    problems = [f"{name}: missing, expected {list(shape)}" for name, shape in expected.items() if name not in stored]
    for name, tensor in stored.items():
        place = "config.json" if isinstance(tensor, AbsentTensor) else tensor.file.path.name
        if name not in expected:
            if not _is_redundant(name, config):
                problems.append(f"{name}: {list(tensor.shape)} in {place} has no place in this model")
        elif tensor.shape != expected[name]:
            problems.append(f"{name}: is {list(tensor.shape)} in {place}, expected {list(expected[name])}")
        elif BY_NUMPY.get(tensor.dtype) not in FLOATS:
            expected_types = ", ".join(kind.name for kind in FLOATS)
            problems.append(f"{name}: is {tensor.dtype.name} in {place}, expected {expected_types}")
    # transformers 5 unties copies that differ, transformers 4 ties them all the same: no guess is right.
    has_copy = not problems and config.tie_word_embeddings and HEAD in stored
    if has_copy and not are_equal(stored[HEAD], stored[EMBEDDING]):
        problems.append("lm_head.weight: differs from model.embed_tokens.weight, but tie_word_embeddings is true")
    if problems:
        listed = problems[:MAX_LISTED_PROBLEMS]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise CheckpointError(
            f"{path}: {len(problems)} tensors are not what {said_by} describes\n  " + "\n  ".join(listed),
            hint=f"{said_by} belongs to another model, or the checkpoint is incomplete",
        )


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    # Old conversions saved the rotary frequencies, which follow from the configuration.
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings)
