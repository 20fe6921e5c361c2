"""The tokenizer a GGUF file describes, in the form Hugging Face libraries load.

Only byte-level BPE: the vocabulary and the merges are in the file, but how text is cut into words before merging is
only named there (`tokenizer.ggml.pre`), so each name has to be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_file import save_json

PREFIX = "tokenizer.ggml."
# Kinds of token in tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign before it
    r"|\p{N}{1,3}"  # digits by threes
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, up to the end of the line
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space, leaving one space to the next word
)
SPLITTERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    # transformers 5.23 ignores this name when it converts GGUF, and joins spaces before digits that training did not.
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
# Names of the special tokens in tokenizer_config.json, and in GGUF.
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class GgufTokenizer:
    """A tokenizer built from GGUF metadata.

    Args:
        metadata: Of the file; must have `tokenizer.ggml.model`.
        origin: The file, for messages.

    Raises:
        CheckpointError: The tokenizer is of an unknown kind, or its tables contradict each other.
    """

    def __init__(self, metadata: Mapping[str, Any], origin: Path) -> None:
        self._metadata = metadata
        self._origin = origin
        if self._get("model") != "gpt2":
            raise self._error(f"{PREFIX}model is {self._get('model')!r}, expected 'gpt2' (byte-level BPE)")
        if self._get("pre") not in list(SPLITTERS):
            raise self._error(f"{PREFIX}pre is {self._get('pre')!r}, expected one of {', '.join(SPLITTERS)}")
        self._tokens = self._strings("tokens")
        self._special = {role: self._special_token(name) for role, name in ROLES.items()}
        self._backend = self._build()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which also holds the chat template."""
        self._backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {
            # The class that takes tokenizer.json as it is; GPT2Tokenizer would cut words its own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # transformers 4 would add token_type_ids, which no Llama takes.
            "model_input_names": ["input_ids", "attention_mask"],
            **{role: token for role, token in self._special.items() if token is not None},
        }
        # Longer texts are only warned about, but without the number nothing is.
        architecture = self._metadata.get("general.architecture")
        context = self._metadata.get(f"{architecture}.context_length")
        if context is not None:
            settings["model_max_length"] = context
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None:
            settings["chat_template"] = template
        save_json(folder / "tokenizer_config.json", settings)

    def _build(self) -> Tokenizer:
        pre = self._get("pre")
        vocabulary = {token: index for index, token in enumerate(self._tokens)}
        if len(vocabulary) != len(self._tokens):
            raise self._error(f"{PREFIX}tokens has {len(self._tokens) - len(vocabulary)} duplicates")
        try:
            merges = [_pair(merge) for merge in self._strings("merges")]
            # Llama 3 takes a word that is a token as it is, even where the merges would not lead there.
            backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
        except Exception as err:  # tokenizers raises nothing more specific
            raise self._error(f"{PREFIX}merges does not fit the tokens ({err})") from err
        backend.pre_tokenizer = SPLITTERS[pre]()
        backend.decoder = decoders.ByteLevel()
        # Without this they would be cut into pieces like any text.
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in self._tokens_of(CONTROL)])
        backend.add_tokens([AddedToken(t, normalized=False) for t in self._tokens_of(USER_DEFINED)])
        bos = self._special["bos_token"]
        if bos is not None and self._get("add_bos_token", pre == "llama-bpe"):
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, vocabulary[bos])]
            )
        return backend

    def _tokens_of(self, kind: int) -> list[str]:
        kinds = self._get("token_type", [0] * len(self._tokens))
        if not isinstance(kinds, list) or len(kinds) != len(self._tokens):
            raise self._error(f"{PREFIX}token_type does not have one entry for each of {len(self._tokens)} tokens")
        return [token for token, its_kind in zip(self._tokens, kinds, strict=True) if its_kind == kind]

    def _special_token(self, name: str) -> str | None:
        index = self._get(f"{name}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self._tokens):
            raise self._error(f"{PREFIX}{name}_token_id is {index!r}, expected one of {len(self._tokens)} tokens")
        return self._tokens[index]

    def _strings(self, name: str) -> list[str]:
        values = self._get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._error(f"{PREFIX}{name} is missing or not an array of strings")
        return values

    def _get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(PREFIX + name, default)

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._origin}: {text}", hint="export the original Hugging Face checkpoint instead")


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
