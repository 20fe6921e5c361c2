"""The documentation's commands, run as a new user would on a tiny model; its Python, options, links and names."""

import functools
import itertools
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from dlo_export.exporter.app import app
from tests.documents import DOCUMENTS, ROOT, commands, inline_code, python_blocks, text_of
from tests.exporter import forked_commands
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

OURS = ("dlo", "dlo-export")
COMMANDS = ("expand", "calibrate", "train", "export", "run", "bench", "evaluate", "inspect", "parity")
# Commands that do not end with 0 everywhere: what they end with where something is missing, and what that is.
ENDINGS = {
    "dlo bench --tune my-artefact/ --prompt-tokens 128 --decode-tokens 32": (
        2,
        "no artefact of a routed model lies there; tests/exporter/test_tune.py tunes one",
    ),
    "dlo-export my-model/ --lowering plugin --ort-plugin-library plugins/library/build/libdlo_ort.so": (
        2,
        "the model there has no routers; the library needs ONNX Runtime's headers to be built",
    ),
    "dlo-export my-model/ --trt --lowering plugin --trt-plugin-library build/plugins/libdlo_plugins.so": (
        2,
        "the library needs TensorRT's headers to be built",
    ),
}
# Blocks of Python that need what this machine may lack, by the document and the error that says so.
MISSING = {
    ("docs/artefact.md", "libdlo_ort.so"): "the library needs ONNX Runtime's headers to be built",
    ("docs/tensorrt.md", "libdlo_plugins.so"): "the library needs TensorRT's headers to be built, an engine a GPU",
    ("plugins/README.md", "No module named 'tensorrt'"): "enterprise TensorRT comes from the vendor's index",
}
SHOWN = [command for document in DOCUMENTS for command in commands(document)]
NOT_OURS = [command for command in SHOWN if command.arguments[0] not in OURS]
WITH_COMMANDS = sorted({shown.document for shown in SHOWN if shown.to_run and shown.arguments[0] in OURS})
WITH_PYTHON = [document for document in DOCUMENTS if python_blocks(document)]
# Options of programs that are not ours.
OTHERS_OPTIONS = {"--build", "--install", "--target", "--ep", "--model-type", "--display-as"}
OTHERS_OPTIONS |= {option for command in SHOWN if command.arguments[0] == "polygraphy" for option in command.options}
OTHERS_OPTIONS |= set(launch_command_parser()._option_string_actions)


def run(arguments, folder=ROOT):
    """A finished command; its output is text."""
    return subprocess.run([str(part) for part in arguments], cwd=folder, capture_output=True, text=True, check=False)


def installed(program):
    return Path(sys.executable).with_name(program)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the documents take for granted: checkpoints, texts, an adapter, somebody's graph and an adapter to it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny_llama(folder / "model", layers=6, vocab=BYTE_VOCABULARY, tokenizer=True)
    (folder / "my-model").symlink_to("model")
    (folder / "corpus").mkdir()
    for position, source in enumerate(sorted((ROOT / "exporter").glob("*.py"))):
        (folder / "corpus" / f"{position}.txt").write_text(source.read_text())
    (folder / "optimum-export").symlink_to(ROOT / "tests" / "data" / "optimum_llama")
    for model, adapter in (("model", "tli"), ("optimum-export", "adapter")):
        command = ["expand", model, "-o", adapter, "--adapter", "--every", "2"]
        result = forked_commands.run(*command, working_folder=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def artefact(made, tmp_path_factory):
    """What a document's Python opens, with an engine."""
    folder = tmp_path_factory.mktemp("artefact") / "artefact"
    result = forked_commands.run("export", made / "model", "-o", folder, "--trt", "--no-parity")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def workplace(made, tmp_path):
    """All of that, for one document to work on."""
    return shutil.copytree(made, tmp_path / "workplace", symlinks=True)


def test_readme_shows_every_command():
    shown = {
        "dlo export" if command.arguments[0] == "dlo-export" else " ".join(command.arguments[:2])
        for command in commands("README.md")
        if command.to_run and command.arguments[0] in OURS
    }
    assert shown == {f"dlo {name}" for name in COMMANDS}


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_work_when_run_in_order(document, workplace):
    for command in commands(document):
        program, *arguments = command.arguments
        if not command.to_run or program not in OURS:
            continue
        if "other-artefact/" in arguments:
            shutil.copytree(workplace / "artefact", workplace / "other-artefact")
        # In a process that has imported everything; that the installed programs start, tests/test_package.py shows.
        given = arguments if program == "dlo" else ["export", *arguments]
        process = forked_commands.start(given, workplace / "messages", working_folder=workplace)
        process.join()
        result = forked_commands.ended(process, workplace / "messages")
        code, _ = ENDINGS.get(shlex.join(command.arguments), (0, ""))
        assert result.returncode in {0, code}, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip() or result.returncode, command


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_runs_when_pasted_into_a_file(document, workplace, artefact):
    shutil.copytree(artefact, workplace / "artefact")
    for position, block in enumerate(python_blocks(document)):
        file = workplace / f"test_block_{position}.py"
        file.write_text(block)
        work = run_tests if "def test_" in block else functools.partial(runpy.run_path, run_name="__main__")
        process = forked_commands.start(
            functools.partial(work, str(file)), workplace / "messages", working_folder=workplace
        )
        process.join()
        result = forked_commands.ended(process, workplace / "messages")
        missing = [reason for (where, error), reason in MISSING.items() if where == document and error in result.stderr]
        assert result.returncode == 0 or missing, f"{block}\n{result.stdout}\n{result.stderr}"


def run_tests(file):
    """Ends as pytest does: with 0 where there are tests and all pass."""
    sys.exit(pytest.main(["-p", "no:cacheprovider", file]))


# Not run as they stand: benchmarks take minutes, some a GPU; building the library and the sample takes TensorRT's
# headers (test_library.py, test_cpp_sample.py run them where those are); test_package.py installs the wheel;
# test_tensorrt_polygraphy.py runs Polygraphy on the graphs an export writes. What can be said is said here.
@pytest.mark.parametrize("command", sorted(set(NOT_OURS), key=str), ids=str)
def test_other_programs_take_what_is_shown_when_asked_for_their_help(command, monkeypatch, capsys):
    program, *arguments = command.arguments
    match program:
        case "python":
            assert arguments[0] == "-m"
            monkeypatch.setattr(sys, "argv", [arguments[1], "--help"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            assert ended.value.code == 0
            assert command.options <= options_in(capsys.readouterr().out)
        case "pip":
            assert arguments[0] == "install"
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extras in re.findall(r"dlo-export\[([a-z,]+)\]", " ".join(arguments)):
                assert set(extras.split(",")) <= set(project["optional-dependencies"])
        case "accelerate":
            given = launch_command_parser().parse_args(arguments[1:])
            assert (arguments[0], given.training_script) == ("launch", "$(which dlo)")
            described = run([installed("dlo"), given.training_script_args[0], "--help"]).stdout
            assert options_in(" ".join(given.training_script_args)) <= options_in(described)
        case "make":
            shown = run(["make", "--dry-run", *arguments])
            assert shown.returncode == 0, shown.stderr
        case "cmake" if "-S" in arguments:
            script = (ROOT / arguments[arguments.index("-S") + 1] / "CMakeLists.txt").read_text()
            assert all(name in script for name in re.findall(r"-D(\w+)=", " ".join(arguments)))
        case "cmake":
            configured = [shown.arguments[4] for shown in SHOWN if shown.arguments[:4:3] == ("cmake", "-B")]
            assert {"--build", "--install"} & {arguments[0]}
            assert arguments[1] in configured
        case "polygraphy":
            monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
            tool = itertools.takewhile(lambda argument: "/" not in argument, arguments)
            shown = run([installed("polygraphy"), *tool, "--help"])
            assert command.options <= options_in(shown.stdout), shown.stderr
        case "build/dlo_generate" | "build/cpp_onnxruntime/generate":
            sample = "cpp" if program == "build/dlo_generate" else "cpp_onnxruntime"
            source = (ROOT / "samples" / sample / "generate.cpp").read_text()
            assert all(f'"{option}"' in source for option in command.options)
        case _:
            pytest.fail(f"{program}: nothing here says how its commands are checked")


def options_in(text):
    """Long options that a text names."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))


@pytest.fixture(scope="module")
def our_options():
    """Of our commands, and those that other programs of the repository name in their source."""
    every = [command.name for command in app.registered_commands]
    helps = [forked_commands.run(*command, "--help").stdout for command in ([], *([name] for name in every))]
    sources = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("plugins/**/*.py"), *ROOT.glob("samples/**/*.cpp")]
    literals = [" ".join(re.findall(r'"(--[a-z-]+)"', source.read_text())) for source in sources]
    return options_in(" ".join([*helps, *literals]))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_exist_when_named(document, our_options):
    assert not options_in(text_of(document)) - our_options - OTHERS_OPTIONS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist_when_named_or_linked(document):
    text = text_of(document)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    named = re.findall(r"(?<![\w./-])[a-z_]+/[\w/]+\.(?:py|md|cpp|h|txt)\b", text)
    # Names of files of an artefact or of another project begin with no folder of ours.
    ours = [name for name in named if (ROOT / name.split("/")[0]).is_dir()]
    places = [*((ROOT / document).parent / link for link in links), *(ROOT / name for name in ours)]
    assert not [str(place) for place in places if not place.exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_what_they_hold_exist_when_named(document):
    for name in re.findall(r"\bdlo_export(?:\.\w+)+", " ".join(inline_code(document))):
        assert pkgutil.resolve_name(name)
