"""The distributions people install: what is in them, and that they work away from this repository.

With `--bare` (`make test-wheel`) the wheel brings its own dependencies from the package index, into an environment that
holds nothing else; without, it borrows those of the environment the tests run in.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import dlo_export
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

ROOT = Path(__file__).parents[1]
ROOMS = ("checkpoints", "exporter", "graph_passes", "modeling", "plugins", "runtimes")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def built(kind, source, output):
    """The one file that setuptools' backend makes of a source tree, as pip calls it; no network."""
    subprocess.run([sys.executable, "-c", BUILD.format(kind), str(output)], cwd=source, check=True, capture_output=True)
    (file,) = output.iterdir()
    return file


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """Built from a copy, so that neither an old build folder is packed nor a new one left behind."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("dlo_export", "tests", *ROOMS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "build"))
    return built("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source_distribution, tmp_path_factory):
    """Built from the source distribution, as for a machine that finds no wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(source_distribution) as archive:
        # Python has filters since 3.11.4, and asks for one since 3.12.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    (tree,) = folder.iterdir()
    return built("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(request, wheel, tmp_path_factory):
    """`bin` of an environment with the wheel and its dependencies."""
    if request.config.getoption("bare"):
        folder = ROOT / "build" / "bare-environment"
        venv.create(folder, clear=True)
        install(folder, "torch==2.13.0")  # first and alone, as in the Makefile
        install(folder, "-c", str(ROOT / "constraints.txt"), f"{wheel}[torch]")
        return folder / "bin"
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    install(folder, "--no-index", "--no-deps", str(wheel))
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder named by a .pth file has its own .pth files left alone, so that this checkout stays out of sight.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def install(environment, *arguments):
    """Installs into an environment that has no pip of its own; what is imported is compiled then."""
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-compile", *arguments], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workplace")
    save_tiny_llama(folder / "model", layers=2, vocab=BYTE_VOCABULARY, tokenizer=True)
    return folder


def run(command, workplace):
    """What a command prints, run where nothing leads to this repository."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=workplace, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_brings_one_import_name_and_every_module_when_built(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename for entry in archive.infolist()}
    modules = {f"dlo_export/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    modules |= {f"dlo_export/{path.name}" for path in (ROOT / "dlo_export").glob("*.py")}
    assert {name.split("/")[0] for name in files} == {"dlo_export", f"dlo_export-{dlo_export.__version__}.dist-info"}
    assert {name for name in files if name.endswith(".py")} == modules


def test_wheel_holds_what_is_no_python_too_when_built(wheel):
    library = ROOT / "plugins" / "library"
    sources = {
        str(path.relative_to(library))
        for path in (*library.iterdir(), *(library / "onnxruntime").iterdir())
        if path.suffix in {".cpp", ".h"} or path.name in {"CMakeLists.txt", "Makefile"}
    }
    runtime = ROOT / "runtimes" / "cpp"
    headers = {
        str(path.relative_to(runtime)) for path in runtime.rglob("*") if path.suffix in {".txt", ".cmake", ".in", ".h"}
    }
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert len(sources) > 10
    assert len(headers) > 8
    assert {f"dlo_export/plugins/library/{name}" for name in sources} | {"dlo_export/py.typed"} <= files
    assert {f"dlo_export/runtimes/cpp/{name}" for name in headers} <= files


def test_source_distribution_holds_files_and_no_links_when_built(source_distribution):
    with tarfile.open(source_distribution) as archive:
        members = [member for member in archive if not member.isdir()]
    assert all(member.isfile() for member in members)
    tops = {Path(member.name).parts[1] for member in members}
    assert not tops & {"tests", *ROOMS}


def test_installed_package_is_the_wheels_when_imported(environment, workplace):
    code = "import dlo_export.exporter.cli as cli, dlo_export; print(dlo_export.__version__, cli.__file__)"
    version, file = run([environment / "python", "-c", code], workplace).split()
    assert version == dlo_export.__version__
    assert Path(file).is_relative_to(environment.parent)


@pytest.mark.parametrize("command", ["dlo", "dlo-export"])
def test_installed_command_explains_itself_when_asked(environment, workplace, command):
    assert f"Usage: {command.replace('-', ' ')}" in run([environment / command, "--help"], workplace)


def test_installed_command_exports_when_away_from_the_repository(environment, workplace):
    output = run([environment / "dlo-export", "model", "-o", "artefact", "--no-parity"], workplace)
    assert "artefact" in output
    assert (workplace / "artefact" / "model.onnx").is_file()


def test_installed_assert_parity_returns_a_proven_artefact_when_it_passes(environment, workplace):
    code = "from dlo_export.testing import assert_parity; print(assert_parity('model', 'proven').folder)"
    assert run([environment / "python", "-c", code], workplace).strip() == "proven"
    assert (workplace / "proven" / "parity.json").is_file()
