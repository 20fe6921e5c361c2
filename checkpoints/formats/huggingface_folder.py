"""Checkpoints in Hugging Face form: a folder of config.json, safetensors and tokenizer files."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.dtypes import FLOAT32, FLOATS
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.files.file_inside import file_inside
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.quantised_folder import check_not_quantised
from dlo_export.checkpoints.formats.safetensors_reader import tensors_of_safetensors
from dlo_export.checkpoints.formats.stored_tensors import StoredName, model_tensors
from dlo_export.checkpoints.lazy_tensors import AbsentTensor
from dlo_export.checkpoints.llama_checkpoint import Checkpoint
from dlo_export.checkpoints.llama_layer import HEAD
from dlo_export.checkpoints.tokenization.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from dlo_export.checkpoints.tokenization.sentencepiece_folder import ConvertedTokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What an artefact takes over besides config.json; each only if it is there.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def open_folder(folder: Path, *, weights: bool = True) -> Checkpoint:
    """Opens a folder that holds config.json and `model.safetensors`, or shards and their index.

    Args:
        folder: As a training script or the hub's client left it.
        weights: False does without the weights' files where there are none: the tensors are config.json's.

    Raises:
        CheckpointError: A file is missing, damaged, outside the folder, or not of a supported model; or one says that
            the weights are quantised.
    """
    config = LlamaConfig.from_json(_config_file(folder))
    check_not_quantised(folder)
    if not weights and not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return _without_weights(folder, config)
    files, stored, indexed = _open_weights(folder)
    tensors, unequal = model_tensors(stored, config)
    if unequal:
        raise CheckpointError(
            f"{folder}: {len(unequal)} tensors are stored more than once, with different values\n  "
            + "\n  ".join(unequal),
            hint="delete the copies that do not belong to this model",
        )
    unknown = [name for name in tensors.keys() - config.tensor_shapes().keys() if name != HEAD]
    # What the index names is checked; what it does not is a leftover of another save.
    leftovers = sorted(name for name in unknown if indexed is not None and name not in indexed)
    sizes: dict[str, int] = defaultdict(int)
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += tensor.nbytes
    tokenizer = FolderTokenizer(folder, config.vocab_size)
    return Checkpoint(
        folder,
        config,
        {name: tensor for name, tensor in tensors.items() if name not in leftovers},
        stored_dtype=max(sizes, key=lambda name: sizes[name], default="float32"),
        files=files,
        save_tokenizer=tokenizer.save,
        warnings=[*tokenizer.warnings, *_leftover_warnings(folder, leftovers)],
    )


def _without_weights(folder: Path, config: LlamaConfig) -> Checkpoint:
    """What config.json says of a model, in the element type that it says, else in float32."""
    kind = next((kind for kind in FLOATS if kind.name == config.dtype), FLOAT32)
    tokenizer = FolderTokenizer(folder, config.vocab_size)
    return Checkpoint(
        folder,
        config,
        {name: AbsentTensor(shape, kind.numpy) for name, shape in config.tensor_shapes().items()},
        stored_dtype=kind.name,
        files=(),
        save_tokenizer=tokenizer.save,
        warnings=tokenizer.warnings,
    )


def _leftover_warnings(folder: Path, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"{folder / INDEX_FILE}: does not name {listed}, which have no place in this model and are left out"]


def cached_snapshot(repository: str) -> Path:
    """Folder of a hub repository's main revision in the local Hugging Face cache.

    Raises:
        InputError: The repository is not in the cache, or only parts of it that do not include config.json.
    """
    # Imported here because it is needed for hub ids alone.
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        config = try_to_load_from_cache(repository, "config.json")
    except HFValidationError as err:
        raise InputError(
            f"{repository}: no such file or folder, and not a hub id ({err})",
            hint="give a folder, a .gguf or .onnx file, or a hub id such as HuggingFaceTB/SmolLM2-135M",
        ) from err
    if not isinstance(config, str):
        raise InputError(
            f"{repository}: no such file or folder, and no such repository in the local Hugging Face cache",
            hint=f"download it first: hf download {repository}",
        )
    return Path(config).parent


def _config_file(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        gguf = sorted(path.name for path in folder.glob("*.gguf"))
        raise CheckpointError(
            f"{folder}: has no config.json",
            hint=f"give the GGUF file itself: {folder / gguf[0]}" if gguf else "expected a Hugging Face checkpoint",
        )
    return file_inside(folder, "config.json")


def _open_weights(folder: Path) -> tuple[list[MappedFile], list[StoredName], Collection[str] | None]:
    """The files, every tensor of each, and the names in the index, if there is one."""
    # The order transformers looks in.
    if (folder / SINGLE_FILE).exists():
        file = MappedFile(file_inside(folder, SINGLE_FILE))
        return [file], _stored(file), None
    if (folder / INDEX_FILE).exists():
        return _open_shards(folder)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    raise CheckpointError(
        f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}"
        + (f", only {', '.join(pickled)}, which are Python pickles and never read" if pickled else ""),
        hint=f"give the graph itself: {folder / graphs[0]}"
        if (graphs := sorted(path.name for path in folder.glob("*.onnx")))
        else "convert it: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET) writes safetensors",
    )


def _open_shards(folder: Path) -> tuple[list[MappedFile], list[StoredName], Collection[str]]:
    """Opens the shards that the index names; as transformers does, takes all in them, wherever it says they are."""
    index_file = file_inside(folder, INDEX_FILE)
    file_of = read_json(index_file, CheckpointError).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise CheckpointError(
            f"{index_file}: weight_map is not an object of tensor names and file names",
            hint="the file is damaged: fetch it again",
        )
    problems: list[str] = []
    files: list[MappedFile] = []
    stored: list[StoredName] = []
    for name in sorted(set(file_of.values())):
        try:
            file = MappedFile(file_inside(folder, name))
            stored += _stored(file)
        except CheckpointError as err:
            problems.append(err.message)
        else:
            files.append(file)
    if problems:
        raise CheckpointError(
            f"{index_file}: the shards are not what the index says\n  " + "\n  ".join(problems),
            hint="is the checkpoint complete?",
        )
    return files, stored, file_of.keys()


def _stored(file: MappedFile) -> list[StoredName]:
    return [StoredName(name, tensor) for name, tensor in tensors_of_safetensors(file).items()]


class FolderTokenizer:
    """The tokenizer's files of a folder. A tokenizer.model without a tokenizer.json is converted: few can read it.

    Args:
        folder: A checkpoint's folder, or a foreign graph's.
        vocab_size: Of the model; None where nothing says.

    Attributes:
        warnings: What a user should know about the conversion.

    Raises:
        CheckpointError: One of the files is damaged, or leads out of the folder; or the tokenizer has tokens that the
            model has not.
    """

    def __init__(self, folder: Path, vocab_size: int | None = None) -> None:
        self._folder = folder
        self._converted: ConvertedTokenizer | None = None
        self.warnings: list[str] = []
        file = self._file("tokenizer.json")
        if file is not None and vocab_size is not None:
            check_vocabulary(file, vocab_size)
        if file is None and self._file("tokenizer.model") is not None:
            self._convert()

    def save(self, target: Path) -> None:
        """Copies the files, as far as there are any, into an existing folder.

        Raises:
            CheckpointError: One of them is not a regular file of the folder.
        """
        for name in COMPANIONS:
            file = self._file(name)
            if file is not None:
                shutil.copyfile(file, target / name)
        if self._converted is not None:
            self._converted.save(target)

    def _convert(self) -> None:
        # Imported here because it is needed for such folders alone, and takes time.
        from dlo_export.checkpoints.tokenization.errors import UnknownTokenizerError  # noqa: PLC0415
        from dlo_export.checkpoints.tokenization.sentencepiece_folder import convert_sentencepiece  # noqa: PLC0415

        try:
            self._converted = convert_sentencepiece(self._file)
        except UnknownTokenizerError as err:
            self.warnings.append(
                f"{err}: it is copied as it is, and what needs a tokenizer.json cannot read it (onnxruntime-genai, "
                "transformers.js, `dlo bench`, `dlo calibrate`)"
            )
            return
        if self._converted.inexact is not None:
            self.warnings.append(
                f"{self._folder / 'tokenizer.model'}: some texts may become other tokens by the tokenizer.json made of "
                f"it, because {self._converted.inexact}"
            )

    def _file(self, name: str) -> Path | None:
        path = self._folder / name
        return file_inside(self._folder, name) if path.exists() or path.is_symlink() else None
