"""The tokenizer a GGUF file describes, in the form Hugging Face libraries load.

Two kinds: byte-level BPE (`tokenizer.ggml.model` is "gpt2"), whose merges are in the file, and SentencePiece ("llama"),
whose merges follow from the scores in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.checkpoints.tokenization.errors import UnknownTokenizerError
from dlo_export.checkpoints.tokenization.sentencepiece import SentencePieceVocabulary
from dlo_export.checkpoints.tokenization.special_tokens import TokenKind, add_boundary_tokens, keep_whole
from dlo_export.checkpoints.tokenization.word_splitting import DEFAULT, WORD_SPLITTINGS, WordSplitting

PREFIX = "tokenizer.ggml."
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
# `tokenizer.ggml.model` of files that were made without a vocabulary.
NO_VOCABULARY = (None, "no_vocab", "none")
# Names of the special tokens in tokenizer_config.json, and in GGUF.
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# What SentencePiece files that do not name them mean.
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
# Tokens that end an answer: of the text, of a turn of a chat, of a message to a tool.
ENDS = ("eos", "eot", "eom")


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a file holds a vocabulary."""
    return metadata.get(PREFIX + "model") not in NO_VOCABULARY


def special_token_id(metadata: Mapping[str, Any], role: str) -> Any:
    """The id a file gives a token ("bos", "eos", "eot", "padding", …), as it is stored; None if it has none."""
    default = SENTENCEPIECE_IDS.get(role) if metadata.get(PREFIX + "model") == SENTENCEPIECE else None
    return metadata.get(f"{PREFIX}{role}_token_id", default)


def end_token_ids(metadata: Mapping[str, Any]) -> list[Any]:
    """The ids that end generation, without duplicates, as they are stored."""
    ids = [special_token_id(metadata, role) for role in ENDS]
    return [index for place, index in enumerate(ids) if index is not None and index not in ids[:place]]


class GgufTokenizer:
    """A tokenizer built from GGUF metadata.

    Args:
        metadata: Of the file; `has_tokenizer` must be true of it.
        origin: The file, for messages.

    Attributes:
        tokens: The vocabulary, by id.
        warnings: What a user should know about the conversion.

    Raises:
        UnknownTokenizerError: The tokenizer is of a kind that is not known here.
        CheckpointError: Its tables contradict each other.
    """

    def __init__(self, metadata: Mapping[str, Any], origin: Path) -> None:
        self._metadata = metadata
        self._origin = origin
        self.warnings: list[str] = []
        if self._get("model") not in (BYTE_LEVEL, SENTENCEPIECE):
            raise self._unknown("model")
        # llama.cpp gives empty tokens a name, too; there can be several.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self._strings("tokens"))]
        if len(set(self.tokens)) != len(self.tokens):
            raise self._error(f"{PREFIX}tokens has {len(self.tokens) - len(set(self.tokens))} duplicates")
        self._template = self._metadata.get("tokenizer.chat_template")
        if not isinstance(self._template, str | None):
            raise self._error(f"tokenizer.chat_template is {self._template!r}, expected text")
        self._special = {role: self._special_token(name) for role, name in ROLES.items()}
        self._backend = self._byte_level() if self._get("model") == BYTE_LEVEL else self._sentencepiece()
        self._backend.add_special_tokens([token for token in self._special.values() if token is not None])

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which also holds the chat template."""
        self._backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {
            # The class that takes tokenizer.json as it is; GPT2Tokenizer and LlamaTokenizer build their own from it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            # transformers 4 would add token_type_ids, which the graph does not take.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **{role: token for role, token in self._special.items() if token is not None},
        }
        # Longer texts are only warned about, but without the number nothing is.
        architecture = self._metadata.get("general.architecture")
        context = self._metadata.get(f"{architecture}.context_length")
        if context is not None:
            settings["model_max_length"] = context
        if self._template is not None:
            settings["chat_template"] = self._template
        save_json(folder / "tokenizer_config.json", settings)

    def _byte_level(self) -> Tokenizer:
        splitting = self._word_splitting()
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        try:
            merges = [_pair(merge) for merge in self._strings("merges")]
            backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
        except Exception as err:  # tokenizers raises nothing more specific
            raise self._error(f"{PREFIX}merges does not fit the tokens ({err})") from err
        backend.pre_tokenizer = splitting.pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        keep_whole(backend, self.tokens, self._kinds)
        self._add_boundary_tokens(backend, bos=splitting.adds_bos)
        return backend

    def _sentencepiece(self) -> Tokenizer:
        vocabulary = SentencePieceVocabulary(
            self.tokens,
            self._numbers("scores", default=0.0),
            self._kinds,
            self._special["unk_token"],
            space_prefix="always" if self._flag("add_space_prefix", default=True) else "never",
            single_spaces=self._flag("remove_extra_whitespaces", default=False),
        )
        reason = vocabulary.inexact()
        if reason:
            self.warnings.append(
                f"{self._origin}: some texts may become other tokens than in llama.cpp, because the tokenizer is "
                f"SentencePiece and {reason}"
            )
        try:
            backend = vocabulary.tokenizer()
        except Exception as err:  # tokenizers raises nothing more specific
            raise self._error(f"{PREFIX}tokens and {PREFIX}scores make no tokenizer ({err})") from err
        self._add_boundary_tokens(backend, bos=True)
        return backend

    def _word_splitting(self) -> WordSplitting:
        pre = self._get("pre")
        if pre is None:
            self.warnings.append(
                f"{self._origin}: {PREFIX}pre is missing, so text is cut into words as llama.cpp does then "
                f"({DEFAULT!r}), which may not be what the model was trained with"
            )
            pre = DEFAULT
        if not isinstance(pre, str) or pre not in WORD_SPLITTINGS:
            raise self._unknown("pre")
        return WORD_SPLITTINGS[pre]

    def _add_boundary_tokens(self, backend: Tokenizer, *, bos: bool) -> None:
        add_boundary_tokens(
            backend,
            self._special["bos_token"] if self._flag("add_bos_token", default=bos) else None,
            self._special["eos_token"] if self._flag("add_eos_token", default=False) else None,
        )

    @cached_property
    def _kinds(self) -> Sequence[int]:
        return self._numbers("token_type", default=TokenKind.NORMAL)

    def _special_token(self, name: str) -> str | None:
        index = special_token_id(self._metadata, name)
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise self._error(f"{PREFIX}{name}_token_id is {index!r}, expected one of {len(self.tokens)} tokens")
        return self.tokens[index]

    def _strings(self, name: str) -> list[str]:
        values = self._get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._error(f"{PREFIX}{name} is missing or not an array of strings")
        return values

    def _numbers(self, name: str, *, default: float) -> list[Any]:
        """One number for each token."""
        values: Any = self._get(name, [default] * len(self.tokens))
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise self._error(f"{PREFIX}{name} does not have one entry for each of {len(self.tokens)} tokens")
        if not all(isinstance(value, (int, float)) and isfinite(value) for value in values):
            raise self._error(f"{PREFIX}{name} is not an array of finite numbers")
        return values

    def _flag(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._error(f"{PREFIX}{name} is {value!r}, expected true or false")
        return value

    def _get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(PREFIX + name, default)

    def _unknown(self, name: str) -> UnknownTokenizerError:
        return UnknownTokenizerError(f"{self._origin}: {PREFIX}{name} is {self._get(name)!r}, which is not known here")

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._origin}: {text}", hint="export the original Hugging Face checkpoint instead")


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
