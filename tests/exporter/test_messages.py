"""Messages: on one screen, harmless to a terminal, with a hint; JSON that others can read."""

import ast
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from dlo_export.checkpoints.errors import DloError, EngineBuildError, InputError, MachineError
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE, report_error
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.json_output import print_json
from dlo_export.exporter.messages import printable
from dlo_export.exporter.progress import Reporter
from tests.exporter import forked_commands
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

ROOT = Path(__file__).parents[2]
ROOMS = ("checkpoints", "graph_passes", "modeling", "plugins", "runtimes", "exporter")
# What could clear a terminal, ring it, hide a name or turn it round; and more than a screen of it.
HOSTILE = "\x1b[2J\x07\r\u202ename\u200b" + "x" * 150


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


def _trees():
    return [(path, ast.parse(path.read_text())) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def _own_errors(trees):
    """Names of our error classes whose hint is given where they are raised, not by a constructor of their own."""
    classes = {node.name: node for _, tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found, before = {"DloError"}, set()
    while found != before:
        before = set(found)
        found |= {
            name
            for name, node in classes.items()
            if {base.id for base in node.bases if isinstance(base, ast.Name)} & found
        }
    return {name for name in found if "__init__" not in {getattr(each, "name", "") for each in classes[name].body}} | {
        "DloError"
    }


def test_every_error_of_ours_is_raised_with_a_hint_of_its_own():
    trees = _trees()
    errors = _own_errors(trees)
    assert {"InputError", "CudaError", "CheckpointError", "TrainingError"} <= errors
    raised, without = 0, []
    for path, tree in trees:
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors):
                continue
            raised += 1
            if not any(given.arg == "hint" for given in node.keywords) and "hint: " not in ast.unparse(node):
                without.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert raised > 150
    assert not without, "\n".join(without)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model, an artefact of it, and text, in folders whose names are hostile."""
    root = tmp_path_factory.mktemp("messages")
    model = save_tiny_llama(root / f"model{HOSTILE}", vocab=BYTE_VOCABULARY, tokenizer=True, routed=(True, False, True))
    export_model(ExportRequest(str(model), root / f"artefact{HOSTILE}"), Reporter())
    (root / f"text{HOSTILE}.txt").write_text("Some words. " * 200)
    return root


WEIGHTS = "model.safetensors"
TEXT = ("--text", f"text{HOSTILE}.txt", "--tokens", "512", "--evaluation-tokens", "512")
MODEL, ARTEFACT, ABSENT = f"model{HOSTILE}", f"artefact{HOSTILE}", f"absent{HOSTILE}"


def _damage_config(root):
    path = root / MODEL / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"hidden_act": HOSTILE * 100, "rope_scaling": [HOSTILE] * 500})
    )


def _rename_tensors(root):
    tensors = load_file(root / MODEL / WEIGHTS)
    save_file({f"{HOSTILE}{name}": tensor for name, tensor in tensors.items()}, root / MODEL / WEIGHTS)


def _damage_description(root):
    path = root / ARTEFACT / "dlo_artifact.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"dtype": HOSTILE * 100, "layers": [{HOSTILE: 1}] * 1000}))


def _nothing(root):
    pass


REFUSED = [
    (_nothing, ("export", ABSENT, "-o", "out")),
    (_nothing, ("export", MODEL, "-o", "out", "--adapter", ABSENT)),
    (_nothing, ("export", MODEL, "-o", "out", "--dtype", HOSTILE * 100)),
    (_nothing, ("export", MODEL, "-o", "out", "--lowering", HOSTILE)),
    (_nothing, ("export", MODEL, "-o", "out", "--trt-cache", HOSTILE * 100)),
    (_nothing, ("export", MODEL, "-o", ARTEFACT)),
    (_nothing, ("expand", ABSENT, "-o", "out")),
    (_nothing, ("expand", MODEL, "-o", "out", "--init", HOSTILE * 100)),
    (_nothing, ("calibrate", ABSENT, "-o", "out")),
    (_nothing, ("calibrate", MODEL, "-o", "out", "--layers", HOSTILE)),
    (_nothing, ("calibrate", MODEL, "-o", "out", "--text", ABSENT)),
    (_nothing, ("train", ABSENT, "-o", "out", "--data", ABSENT)),
    (_nothing, ("train", MODEL, "-o", "out", "--data", ABSENT)),
    (_nothing, ("run", ABSENT, "hello")),
    (_nothing, ("bench", ABSENT)),
    (_nothing, ("inspect", ABSENT, "--json")),
    (_nothing, ("parity", ABSENT, MODEL, "--json")),
    (_nothing, ("parity", ARTEFACT, ABSENT, "--json")),
    (_nothing, (HOSTILE,)),
    (_nothing, ("export", f"--{HOSTILE}")),
    *((_damage_config, (*command, MODEL, "-o", "out")) for command in (("export", "--json"), ("expand",))),
    (_damage_config, ("calibrate", *TEXT, MODEL, "-o", "out", "--json")),
    *((_rename_tensors, (*command, MODEL, "-o", "out")) for command in (("export", "--json"), ("expand",))),
    *((_damage_description, (*command, ARTEFACT)) for command in (("inspect", "--json"), ("bench", "--json"))),
    (_damage_description, ("run", ARTEFACT, "hello")),
    (_damage_description, ("parity", ARTEFACT, MODEL)),
]


@pytest.mark.parametrize(
    ("damage", "arguments"),
    REFUSED,
    ids=[f"{number}-{given[0][:9].encode('ascii', 'replace').decode()}" for number, (_, given) in enumerate(REFUSED)],
)
def test_refusal_is_a_screen_with_a_hint_and_no_control_characters(hostile, tmp_path, damage, arguments):
    for name in (MODEL, ARTEFACT, f"text{HOSTILE}.txt"):
        (tmp_path / name).symlink_to(hostile / name)
    if damage is not _nothing:
        for name in (MODEL, ARTEFACT):
            (tmp_path / name).unlink()
            shutil.copytree(hostile / name, tmp_path / name)
        damage(tmp_path)
    said = tmp_path / "said"
    process = forked_commands.start(arguments, said, working_folder=tmp_path)
    process.join()
    result = forked_commands.ended(process, said)
    assert result.returncode == BAD_INPUT, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\nhint: ") == 1
    assert rows(result.stderr) <= 26, result.stderr
    assert not [letter for letter in result.stderr if letter != "\n" and not letter.isprintable()]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", MODEL, "-o", "out", "--json"),
        ("calibrate", MODEL, "-o", "out", "--json", *TEXT),
        ("inspect", ARTEFACT, "--json"),
        ("parity", ARTEFACT, MODEL, "--json"),
        ("bench", ARTEFACT, "--json", "--rounds", "1", "--prompt-tokens", "4", "--decode-tokens", "2", *TEXT[:2]),
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_is_valid_whatever_names_are_in_it_and_stands_alone_on_stdout(hostile, tmp_path, arguments):
    for name in (MODEL, ARTEFACT, f"text{HOSTILE}.txt"):
        if os.path.isdir(hostile / name):
            shutil.copytree(hostile / name, tmp_path / name)
        else:
            shutil.copy(hostile / name, tmp_path / name)
    said = tmp_path / "said"
    process = forked_commands.start(arguments, said, working_folder=tmp_path)
    process.join()
    result = forked_commands.ended(process, said)
    assert result.returncode == DONE, result.stderr

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(result.stdout, parse_constant=refuse)
    shown = result.stdout + result.stderr
    assert not [letter for letter in shown if letter not in "\n\t" and not letter.isprintable()], shown


def test_print_json_is_valid_when_numbers_are_not_finite(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), (1.5, {"c": float("-inf")})], 3: None})

    def refuse(constant):
        raise AssertionError(constant)

    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown == {"a": None, "b": [None, [1.5, {"c": None}]], "3": None}
