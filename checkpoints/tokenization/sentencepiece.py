"""SentencePiece vocabularies as tokenizer.json: scores become merges, encodings stay the same.

SentencePiece BPE (and llama.cpp's copy of it) joins the two neighbours whose union has the best score, the left-most of
equals. tokenizer.json joins those whose pair comes first in a list. So the list is: all ways to cut a piece into two
other pieces, by the score of the piece.
Source: https://github.com/google/sentencepiece, bpe_model.cc and normalizer.cc; llama.cpp, llm_tokenizer_spm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dlo_export.checkpoints.tokenization.special_tokens import TokenKind, keep_whole

SPACE = "▁"
BYTE_COUNT = 256
# Below every score of a vocabulary: pieces that text must not become.
NEVER = -1e6


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """What SentencePiece knows about a language.

    Attributes:
        pieces: By id, without duplicates.
        scores: Of each piece; log probabilities where the algorithm is "unigram".
        kinds: `TokenKind` of each piece.
        unknown: What stands for characters that are no pieces, where there are no pieces for their bytes either.
        algorithm: How text becomes pieces.
        space_prefix: Whether text starts with a space that it does not have: "always", also after special tokens, or
            "first", at the start of the whole text alone, as transformers does where it says legacy: false.
        single_spaces: Spaces at the ends and repeated ones are dropped.
        charsmap: SentencePiece's compiled table of replaced characters; empty where there are none.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unknown: str | None
    algorithm: Literal["bpe", "unigram"] = "bpe"
    space_prefix: Literal["always", "first", "never"] = "always"
    single_spaces: bool = False
    charsmap: bytes = b""

    def tokenizer(self) -> Tokenizer:
        """The same tokenizer in Hugging Face form, without first and last tokens.

        Raises:
            Exception: The tokenizers package found contradictions.
        """
        backend = Tokenizer(self._bpe() if self.algorithm == "bpe" else self._unigram())
        steps = list(self._normalizers())
        if steps:
            backend.normalizer = normalizers.Sequence(steps)
        pre_tokenizer = self._pre_tokenizer()
        if pre_tokenizer is not None:
            backend.pre_tokenizer = pre_tokenizer
        backend.decoder = self._decoder()
        keep_whole(backend, self.pieces, self.kinds)
        return backend

    def inexact(self) -> str | None:
        """Why some texts, few, may become other tokens than SentencePiece makes of them; None where none can."""
        if self.charsmap:
            return "it replaces characters by a table, which the tokenizers package reads otherwise at combining marks"
        if self.algorithm == "unigram":
            return "it is a unigram model, in which two ways to cut a text can be equally probable"
        scores = self._mergeable
        groups: dict[float, list[str]] = defaultdict(list)
        for piece in {left + right for left, right in self._merges}:
            groups[scores[piece]].append(piece)
        # Among runs of one letter, the order of the merges leads to what the left-most pair does.
        tied = sum(len(group) for group in groups.values() if len(group) > 1 and len(set("".join(group))) > 1)
        if tied:
            return f"{tied} of its tokens share their scores with others, so that the order of merges is not certain"
        lettered = sum(not scores.keys() >= set(piece) for piece in scores if len(piece) > 1)
        if lettered:
            return f"{lettered} of its tokens contain letters that are no tokens, so that no merges lead to them"
        return None

    def _bpe(self) -> models.BPE:
        return models.BPE(
            {piece: index for index, piece in enumerate(self.pieces)},
            self._merges,
            unk_token=self.unknown,
            fuse_unk=True,
            byte_fallback=self._has_bytes,
        )

    def _unigram(self) -> models.Unigram:
        matched = (TokenKind.NORMAL, TokenKind.USER_DEFINED)
        scored = [
            (piece, score if kind in matched else NEVER)
            for piece, score, kind in zip(self.pieces, self.scores, self.kinds, strict=True)
        ]
        unknown = None if self.unknown is None else self.pieces.index(self.unknown)
        return models.Unigram(scored, unk_id=unknown, byte_fallback=self._has_bytes)

    @property
    def _has_bytes(self) -> bool:
        return sum(kind == TokenKind.BYTE for kind in self.kinds) == BYTE_COUNT

    @cached_property
    def _mergeable(self) -> dict[str, float]:
        """Scores of the pieces that text is made of; all others are matched whole, or never."""
        whole = (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.BYTE)
        return {
            piece: score
            for piece, score, kind in zip(self.pieces, self.scores, self.kinds, strict=True)
            if kind not in whole
        }

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        """Pairs in the order they are to be joined.

        Where scores are equal, longer unions go first, and longer left parts: in a run of one letter (llama2.c's files
        score all runs of spaces alike) that is the left-most pair, because its left part has grown the longest.
        """
        scores = self._mergeable
        pairs = [
            (piece[:cut], piece[cut:])
            for piece in scores
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
        return sorted(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0] + pair[1]), -len(pair[0])))

    def _normalizers(self) -> Iterator[normalizers.Normalizer]:
        if self.charsmap:
            yield normalizers.Precompiled(self.charsmap)
        if self.single_spaces:
            # At the end, what is a space's mark in the text itself goes as well.
            yield normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")
            yield normalizers.Replace(Regex(" {2,}"), " ")
        if self.space_prefix == "always":
            yield normalizers.Prepend(SPACE)
        if self.space_prefix != "first":  # else Metaspace does it
            yield normalizers.Replace(" ", SPACE)

    def _pre_tokenizer(self) -> pre_tokenizers.PreTokenizer | None:
        if self.space_prefix == "first":
            return pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        if self.algorithm == "bpe":
            # Says what holds anyway, that merges go across words: onnxruntime-genai 0.18 cuts text at spaces otherwise.
            return pre_tokenizers.Split(Regex(r"[\s\S]+"), behavior="isolated")
        return None

    def _decoder(self) -> decoders.Decoder:
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.space_prefix != "never":
            steps.append(decoders.Strip(" ", 1, 0))
        return decoders.Sequence(steps)
