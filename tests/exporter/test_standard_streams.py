"""Streams that are closed, full, or whose reader has gone, in processes that have such streams."""

import subprocess
import sys

import pytest

PREPARE = "import sys; from dlo_export.exporter.standard_streams import *; prepare_streams(); "


def run(code, redirection=""):
    command = f"exec {sys.executable} -c '{PREPARE}{code}' {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("stream", ["1", "2"])
def test_file_does_not_get_a_standard_streams_number_when_it_is_closed(stream, tmp_path):
    path = tmp_path / "file"
    code = f'file = open("{path}", "w"); print(f"a line", file=sys.stdout if {stream} == 1 else sys.stderr, flush=True)'
    result = run(code, f"{stream}>&-")
    assert result.returncode == 0, result.stderr
    assert path.read_text() == ""


def test_messages_are_dropped_but_results_are_missed_when_nothing_can_be_written():
    code = """
try:
    print("message", file=sys.stderr, flush=True)
    print("result", flush=True)
except OSError as error:
    sys.exit(7 if is_stdout_gone(error) else 8)
"""
    command = f"exec {sys.executable} -c '{PREPARE}\n{code}' >/dev/full 2>/dev/full"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 7


def test_unknown_characters_are_escaped_when_the_terminals_encoding_lacks_them():
    result = run('print("caf\\u00e9 \\u65e5")', "| cat")
    assert result.returncode == 0
    ascii_result = subprocess.run(
        [sys.executable, "-c", PREPARE + 'print("\\u65e5")'],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert ascii_result.stdout == "\\u65e5\n"
