"""How byte-level tokenizers cut text into words, by the names llama.cpp gives the ways."""

from __future__ import annotations

import pytest

from dlo_export.checkpoints.tokenization.word_splitting import GPT2_WORDS, WORD_SPLITTINGS, WordSplitting

TEXT = "He's 12345 !!\n\n  isCamelCase x²"


def words(pre: str, text: str) -> list[str]:
    return [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in _pieces(pre, text)]


def _pieces(pre: str, text: str) -> list[tuple[str, tuple[int, int]]]:
    return WORD_SPLITTINGS[pre].pre_tokenizer().pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "He|'s| 12345| !!|\n\n | is"),
        ("smollm", "He|'s| |1|2|3|4|5| !!|\n\n | is"),
        ("llama-bpe", "He|'s| |123|45| !!\n\n| | is"),
        ("smaug-bpe", "He|'s| |123|45| !!\n\n| | is"),
        ("qwen2", "He|'s| |1|2|3|4|5| !!\n\n| | is"),
        ("seed-coder", "He|'s| |1|2|3|4|5| !!|\n\n| | is"),
        ("tekken", "He|'s| |1|2|3|4|5| !!\n\n| | is"),
        ("gpt-4o", "He's| |123|45| !!\n\n| | is"),
        ("deepseek-v3", "He|'s| |123|45| !!\n\n| | is"),
        ("deepseek-coder", "He|'|s| |1|2|3|4|5| !!|\n|\n| | is"),
        ("default", "He|'|s| |123|45| |!!|\n\n | is"),
        ("falcon", "He|'|s| |123|45| |!!|\n\n | is"),
    ],
)
def test_words_are_cut_as_llama_cpp_cuts_them_when_named(pre: str, expected: str) -> None:
    assert words(pre, "He's 12345 !!\n\n  is") == expected.split("|")


@pytest.mark.parametrize(
    ("pre", "expected"),
    [("tekken", "a|Camel|Case|HTTPServer"), ("gpt-4o", "a|Camel|Case|HTTPServer"), ("qwen2", "aCamelCaseHTTPServer")],
)
def test_words_start_at_capitals_when_their_pattern_says_so(pre: str, expected: str) -> None:
    assert words(pre, "aCamelCaseHTTPServer") == expected.split("|")


@pytest.mark.parametrize("pre", WORD_SPLITTINGS)
def test_no_text_is_lost_when_words_are_cut(pre: str) -> None:
    places = [place for _, place in _pieces(pre, TEXT)]
    assert places[0][0] == 0
    assert [stop for _, stop in places[:-1]] == [start for start, _ in places[1:]]
    assert places[-1][1] == len(TEXT)


def test_gpt2_pattern_is_that_of_the_tokenizers_package_when_written_out() -> None:
    built_in = WORD_SPLITTINGS["gpt-2"].pre_tokenizer()
    written_out = WordSplitting((GPT2_WORDS, "$never")).pre_tokenizer()
    assert built_in.pre_tokenize_str(TEXT) == written_out.pre_tokenize_str(TEXT)
