"""How a model is meant to generate: end tokens and sampling of generation_config.json and config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_fields import JsonFields
from dlo_export.checkpoints.files.json_file import read_json

FILE_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Tokens and sampling of a folder, as transformers takes them.

    Chat models often list the tokens that end a turn in generation_config.json alone (Llama 3 Instruct), so that file's
    tokens overrule config.json's.

    Attributes:
        bos_token_id: None where the model has no start token.
        eos_token_id: Any of them ends a sequence.
        pad_token_id: None where there is none.
        do_sample: Whether tokens are drawn; greedy otherwise, and the values below mean nothing.
        temperature: Logits are divided by it.
        top_k: Tokens are drawn from so many; 0 for all. transformers' default is 50.
        top_p: Tokens are drawn from this share of probability.
        repetition_penalty: Divides the logits of tokens that occurred; 1 changes nothing. Applies to greedy too.
        context_length: Tokens of prompt and answer that the model was trained for; None where nothing says.
    """

    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    context_length: int | None = None

    @classmethod
    def from_folder(cls, folder: Path, *, origin: Path | None = None) -> Self:
        """Reads a checkpoint's or an artefact's folder; either file may be missing.

        Args:
            folder: Holds the files.
            origin: Folder they were copied from, to be named in its place.

        Raises:
            CheckpointError: A file is damaged, with everything that is wrong.
        """
        has_config = (folder / "config.json").is_file()
        config = LlamaConfig.from_json(folder / "config.json") if has_config else None
        path, shown = folder / FILE_NAME, (origin or folder) / FILE_NAME
        fields = JsonFields(read_json(path, CheckpointError, origin=shown) if path.is_file() else {})
        do_sample = fields.flag("do_sample", default=False)
        generation = cls(
            bos_token_id=_token(fields, "bos_token_id", config.bos_token_id if config else None),
            eos_token_id=_tokens(fields, "eos_token_id", config.eos_token_id if config else ()),
            pad_token_id=_token(fields, "pad_token_id", config.pad_token_id if config else None),
            do_sample=do_sample,
            # Files of greedy models carry leftovers here (a temperature of 0, say) that nobody reads.
            temperature=fields.positive_number("temperature", default=1.0) if do_sample else 1.0,
            top_k=_top_k(fields) if do_sample else 50,
            top_p=_top_p(fields) if do_sample else 1.0,
            repetition_penalty=fields.positive_number("repetition_penalty", default=1.0),
            context_length=config.max_position_embeddings if config else None,
        )
        if fields.problems:
            raise CheckpointError(
                f"{shown}: not a generation configuration\n  " + "\n  ".join(fields.problems),
                hint="correct these fields, or remove the file: config.json's tokens are taken then",
            )
        return generation


def _token(fields: JsonFields, name: str, otherwise: int | None) -> int | None:
    return otherwise if fields.values.get(name) is None else fields.token(name, default=None)


def _tokens(fields: JsonFields, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    # -1 is how Meta's conversion scripts write "none"; the default is never taken, the field is there.
    value = fields.values.get(name)
    return otherwise if value is None or value == -1 else fields.tokens(name, default=0)


def _top_k(fields: JsonFields) -> int:
    return 0 if fields.values.get("top_k") == 0 else fields.integer("top_k", default=50)


def _top_p(fields: JsonFields) -> float:
    share = fields.positive_number("top_p", default=1.0)
    if share > 1:
        fields.problem("top_p", f"is {share}, expected a number above 0 and at most 1")
        return 1.0
    return share
