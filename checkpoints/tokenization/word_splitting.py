"""How byte-level BPE tokenizers cut text into words before they merge: of this, GGUF files hold the name alone.

The names and patterns are llama.cpp's (`tokenizer.ggml.pre`, src/llama-vocab.cpp), whose converter recognises a
tokenizer by what it makes of a test text; a pattern that llama.cpp had to adapt to its own engine is the original here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

DIGIT = r"\p{N}"
GPT2_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d"  # English contractions
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # letters, digits, signs, each with the space before it
    r"|\s+(?!\S)|\s+"  # white space, leaving one space to the next word
)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign before it
    r"|\p{N}{1,3}"  # digits by threes
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, up to the end of the line
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space, leaving one space to the next word
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", DIGIT)  # each digit alone
# As Llama 3, but a word starts where small letters are followed by a capital, and signs take slashes along.
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTION"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTION"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = _CASED_WORDS.replace("CONTRACTION", "").replace("DIGITS", DIGIT)
GPT4O_WORDS = _CASED_WORDS.replace("CONTRACTION", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""  # a sign and the word it starts
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"  # a word with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # signs, up to the end of the line
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER_WORDS = QWEN2_WORDS.replace(
    r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"
)  # signs end before a line does
# Ranges of characters as the patterns of DeepSeek's models have them.
HAN, KANA, SOUTH_AND_EAST_ASIAN = "\u4e00-\u9fa5", "\u3040-\u30ff", "\u0800-\u4e00\uac00-\ud7ff"


@dataclass(frozen=True)
class WordSplitting:
    """One way of cutting text into the words within which tokens are merged.

    Attributes:
        patterns: Applied one after the other to what the ones before left in one piece; what matches is a word, and so
            is what lies between.
        whole_words: A word that is a token is taken as it is, even where the merges would not lead there.
        adds_bos: The first token is put before a text where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The splitting, and the bytes of each word as the letters that stand for them in the vocabulary."""
        # ByteLevel has GPT-2's pattern built in, the form in which every reader of tokenizer.json knows it.
        is_gpt2 = self.patterns[-1] == GPT2_WORDS
        splits = [
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == DIGIT
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.patterns[: -1 if is_gpt2 else None]
        ]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)
        return pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level


# What llama.cpp does where a file names nothing, as those of before May 2024.
DEFAULT = "default"
# Names that mean the same stand together.
WORD_SPLITTINGS: dict[str, WordSplitting] = {
    name: splitting
    for splitting, names in (
        (WordSplitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")), (DEFAULT,)),
        (
            WordSplitting((GPT2_WORDS,)),
            (
                *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0"),
                *("mellum", "modern-bert", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"),
            ),
        ),
        (
            # transformers 5.23 ignores "smollm" when it converts GGUF, and joins spaces before digits that training
            # did not.
            WordSplitting((DIGIT, GPT2_WORDS)),
            ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        ),
        (
            WordSplitting((LLAMA3_WORDS,), whole_words=True, adds_bos=True),
            ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        ),
        (WordSplitting((LLAMA3_WORDS,)), ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe")),
        (
            WordSplitting((QWEN2_WORDS,)),
            ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        ),
        (WordSplitting((SEED_CODER_WORDS,)), ("seed-coder",)),
        (WordSplitting((GPT4O_WORDS,)), ("gpt-4o", "llama4", "kanana2", "talkie")),
        (WordSplitting((TEKKEN_WORDS,), whole_words=True, adds_bos=True), ("tekken",)),
        (
            WordSplitting((r"\p{N}{1,3}", f"[{HAN}{KANA}]+", DEEPSEEK3_WORDS)),
            ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
        ),
        (
            WordSplitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{HAN}{SOUTH_AND_EAST_ASIAN}]+", DIGIT)),
            ("deepseek-coder",),
        ),
        (WordSplitting((r"[\p{P}\$\+<=>\^~\|`]+", GPT2_WORDS, "[0-9][0-9][0-9]")), ("falcon",)),
    )
    for name in names
}
