"""SentencePiece models for tests: trained on the repository's own text, or made of a given vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

ROOT = Path(__file__).parents[1]
VOCABULARY = 600
# They cannot spell a special token: SentencePiece cuts those in text, tokenizer.json never does.
LETTERS = "ab \n\té日🎉0x1/e tionﬁ①\uff21\u3000'ü"
EDGE_CASES = (
    *("", " ", "  ", "   x   ", "Hello world", " Hello", "\n x\n\n", " " * 40 + "x", "a" + " " * 33, "aaaaaaaaaaa"),
    *(
        "naïve café — 日本語 🎉🎉\t\n",
        "0x41 <0x41>",
        "no\u00a0break",
        "\ufeffx",
        "\x00\x01",
        "e\u0301",
        "don't CAN'T 3.14",
    ),
)


def train_sentencepiece(folder: Path, *, algorithm: str = "bpe", **options: object) -> SentencePieceProcessor:
    """Trains `folder/tokenizer.model` on this repository's documentation, as Llama's was trained.

    Args:
        folder: An existing folder.
        algorithm: "bpe", "unigram", "word" or "char".
        options: Of the trainer, instead of Llama's.

    Returns:
        The model.
    """
    lines = [line for file in sorted(ROOT.glob("docs/*.md")) for line in file.read_text().splitlines()]
    with (folder / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([*lines, "naïve café — 日本語 üéﬁ①\uff21", "    x" * 9]),
            model_writer=file,
            model_type=algorithm,
            **{
                "vocab_size": VOCABULARY,
                "hard_vocab_limit": False,
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "allow_whitespace_only_pieces": True,
                "split_digits": True,
                "minloglevel": 2,
                "num_threads": 1,
                **options,
            },
        )
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def gguf_metadata(model: SentencePieceProcessor) -> dict[str, Any]:
    """A model's vocabulary as llama.cpp's converter writes it."""
    ids = range(model.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [model.get_score(index) for index in ids],
        "tokenizer.ggml.token_type": [
            6 if model.is_byte(index) else 3 if model.is_control(index) else 2 if model.is_unknown(index) else 1
            for index in ids
        ],
    }


def sentencepiece_of(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> SentencePieceProcessor:
    """SentencePiece with a vocabulary that was not trained here."""
    model = ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = 6 in kinds
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def many_texts() -> list[str]:
    """Edge cases, pieces of source code and documentation, and random letters."""
    rng = random.Random(0)
    source = "\n".join(file.read_text() for file in (*ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*.py")))
    starts = [rng.randrange(len(source)) for _ in range(400)]
    texts = [source[start : start + rng.randint(1, 120)] for start in starts]
    texts += ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 30))) for _ in range(600)]
    special = ("<unk>", "<s>", "</s>")
    return [*EDGE_CASES, *(text for text in texts if not any(token in text for token in special))]
