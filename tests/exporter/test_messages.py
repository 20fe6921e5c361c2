"""Messages: on one screen, harmless to a terminal, with a hint; JSON that others can read."""

import json
import math

import pytest

from dlo_export.checkpoints.errors import DloError, EngineBuildError, InputError, MachineError
from dlo_export.exporter.exit_codes import report_error
from dlo_export.exporter.json_output import print_json
from dlo_export.exporter.messages import printable


def rows(text):
    return sum(max(1, math.ceil(len(line) / 80)) for line in text.split("\n"))


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"tensor {number} is missing" for number in range(10_000)),
        "x" * 100_000,
        "word " * 50_000,
        "\n".join("word " * 1000 for _ in range(1000)),
        "\x1b" * 10_000,
        "\n" * 10_000,
    ],
    ids=["list", "value", "words", "both", "escapes", "lines"],
)
def test_printable_fits_on_a_screen_when_the_message_is_long(text):
    shown = printable(f"model: {text}\n\nhint: fetch it again {'x' * 10_000}")
    assert rows(shown) <= 24
    assert shown.startswith("model: ")
    assert "\n\nhint: fetch it again" in shown


def test_printable_counts_what_it_leaves_out():
    assert printable("\n".join(["100 problems", *["  a problem"] * 100])).endswith("  … and 85 more lines")
    assert "(99,960 characters)" not in printable("x" * 100)
    shown = printable(f"{'a' * 1000}.safetensors")
    assert shown.endswith("a.safetensors")
    assert " characters) …" in shown


def test_printable_escapes_what_could_steer_a_terminal_or_reorder_text():
    assert printable("a\x1b[2Jb\x07\r\u202ec\u200bd\ud800") == r"a\x1b[2Jb\x07\r\u202ec\u200bd\ud800"
    assert printable("ä 漢 → …") == "ä 漢 → …"


def test_printable_keeps_a_message_when_it_is_short():
    text = "model: config.json: hidden_size is 3\n  and so on\n\nhint: mend it"
    assert printable(text) == text


@pytest.mark.parametrize(
    "error",
    [
        InputError("a"),
        MachineError("a"),
        EngineBuildError("a"),
        OSError(28, "No space left on device"),
        MemoryError(),
        KeyError("bug"),
        ModuleNotFoundError(name="torch"),
        *(kind("a", hint="b") for kind in (DloError, InputError)),
    ],
    ids=repr,
)
def test_report_error_gives_one_hint_whatever_the_error_is(error, capsys):
    report_error(error)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("hint: ") == 1


def test_print_json_is_valid_when_numbers_are_not_finite(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), (1.5, {"c": float("-inf")})], 3: None})

    def refuse(constant):
        raise AssertionError(constant)

    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown == {"a": None, "b": [None, [1.5, {"c": None}]], "3": None}
