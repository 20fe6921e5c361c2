"""Reads SentencePiece's tokenizer.model, a Protocol Buffers message, without that library or its compiler.

Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlo_export.checkpoints.tokenization.errors import UnknownTokenizerError
from dlo_export.checkpoints.tokenization.sentencepiece import SentencePieceVocabulary
from dlo_export.checkpoints.tokenization.special_tokens import TokenKind

# Numbers of the fields that matter, by message.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_KIND = 1, 2, 3
MODEL_TYPE, SPACE_AS_SUFFIX, UNKNOWN_ID, BOS_ID, EOS_ID, PAD_ID = 3, 24, 40, 41, 42, 43
CHARSMAP, SPACE_PREFIX, SINGLE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
ALGORITHMS: dict[int, Literal["bpe", "unigram"]] = {1: "unigram", 2: "bpe"}
LARGEST_FILE = 256 << 20

Field = int | bytes


@dataclass(frozen=True)
class SentencePieceFile:
    """A tokenizer.model.

    Attributes:
        vocabulary: Its pieces and how they are used.
        special_tokens: By their names in tokenizer_config.json ("bos_token"), as far as it has them.
    """

    vocabulary: SentencePieceVocabulary
    special_tokens: Mapping[str, str]


def read_sentencepiece(path: Path, *, legacy: bool = True) -> SentencePieceFile:
    """Reads a tokenizer.model.

    Args:
        path: The file.
        legacy: As in tokenizer_config.json: whether text after a special token starts with a space, too.

    Raises:
        UnknownTokenizerError: It uses what tokenizer.json cannot say, is damaged, or not a SentencePiece model at all:
            Llama 3's own tokenizer.model is of another kind.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path.stat().st_size} bytes are more than a vocabulary takes")
        return _model(list(_fields(path.read_bytes())), path, legacy=legacy)
    except (OSError, ValueError, TypeError, IndexError, struct.error) as err:
        raise UnknownTokenizerError(f"{path}: not a readable SentencePiece model ({err})") from err


def _model(fields: list[tuple[int, Field]], path: Path, *, legacy: bool) -> SentencePieceFile:
    messages = [(number, dict(_fields(value))) for number, value in fields if isinstance(value, bytes)]
    pieces = [message for number, message in messages if number == PIECES]
    trainer = next((message for number, message in messages if number == TRAINER), None)
    normalizer = next((message for number, message in messages if number == NORMALIZER), None)
    # The format could do without; but they come last, and where they are missing the file was cut.
    if not pieces or trainer is None or normalizer is None:
        raise ValueError("it has no pieces, or not what is said behind them")
    algorithm = trainer.get(MODEL_TYPE, 1)
    if algorithm not in ALGORITHMS:
        raise UnknownTokenizerError(f"{path}: its model_type is {algorithm!r}, expected 1 (unigram) or 2 (BPE)")
    if trainer.get(SPACE_AS_SUFFIX, 0) or not normalizer.get(ESCAPE_SPACES, 1):
        raise UnknownTokenizerError(f"{path}: it marks spaces in a way of its own")
    texts = [_text(piece.get(PIECE_TEXT, b"")) for piece in pieces]
    if len(set(texts)) != len(texts):
        raise ValueError(f"{len(texts) - len(set(texts))} of its pieces are there twice")
    ids = {
        "unk_token": trainer.get(UNKNOWN_ID, 0),
        "bos_token": trainer.get(BOS_ID, 1),
        "eos_token": trainer.get(EOS_ID, 2),
        "pad_token": trainer.get(PAD_ID, -1),
    }
    special = {name: texts[index] for name, index in ids.items() if isinstance(index, int) and 0 <= index < len(texts)}
    prefix: Literal["always", "first", "never"] = "always" if legacy else "first"
    vocabulary = SentencePieceVocabulary(
        texts,
        [_float(piece.get(PIECE_SCORE, 0)) for piece in pieces],
        [_integer(piece.get(PIECE_KIND, TokenKind.NORMAL)) for piece in pieces],
        special.get("unk_token"),
        ALGORITHMS[algorithm],
        prefix if normalizer.get(SPACE_PREFIX, 1) else "never",
        single_spaces=bool(normalizer.get(SINGLE_SPACES, 1)),
        charsmap=_bytes(normalizer.get(CHARSMAP, b"")),
    )
    return SentencePieceFile(vocabulary, special)


def _fields(message: bytes) -> Iterator[tuple[int, Field]]:
    """Numbers and values of a message's fields: integers, four or eight bytes, or the bytes of texts and messages."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            # int32 fields hold -1 as 64 bits of two's complement.
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire_type not in (1, 2, 5):
            raise ValueError(f"wire type {wire_type} at byte {position}")
        length, position = _varint(message, position) if wire_type == 2 else (8 if wire_type == 1 else 4, position)
        if length > len(message) - position:
            raise ValueError(f"{length} bytes expected at byte {position}, the message ends before")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number at byte {position} does not end")


def _text(value: Field) -> str:
    return _bytes(value).decode("utf-8")


def _bytes(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number stands where text is expected")
    return value


def _float(value: Field) -> float:
    return float(struct.unpack("<f", value)[0]) if isinstance(value, bytes) else float(value)


def _integer(value: Field) -> int:
    if isinstance(value, bytes):
        raise TypeError("text stands where a number is expected")
    return int(value)
