"""Dependencies point one way, each library has its place, and what must start fast stays free of heavy ones.

The two tables below are the only places where that is written down.
"""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What stands below each room.
ROOMS = {
    "checkpoints": set(),
    "graph_passes": {"checkpoints"},
    "modeling": {"checkpoints", "plugins"},
    "plugins": {"checkpoints", "graph_passes"},
    "runtimes": {"checkpoints", "modeling", "plugins"},
    "exporter": {"checkpoints", "graph_passes", "modeling", "plugins", "runtimes"},
}
# What a folder or file may import from outside, beside what the folders above it may. Only what is listed: a new
# dependency is a decision.
PACKAGES = {
    "checkpoints": {"ml_dtypes", "numpy"},
    "checkpoints/adapter": {"safetensors"},
    "checkpoints/formats": {"gguf", "huggingface_hub", "tokenizers"},
    "checkpoints/tokenization": {"tokenizers"},
    "graph_passes": {"ml_dtypes", "numpy", "onnx_ir"},
    "modeling": {"ml_dtypes", "numpy", "torch", "transformers"},
    "modeling/training": {"accelerate", "deepspeed", "peft", "safetensors"},
    "plugins": {"numpy", "tensorrt", "tensorrt_rtx", "triton"},
    "runtimes": {"ml_dtypes", "numpy"},
    "runtimes/generation/tokenizer.py": {"transformers"},
    "runtimes/onnxruntime": {"onnxruntime"},
    "runtimes/tensorrt": {"cuda", "tensorrt", "tensorrt_rtx"},
    "runtimes/torch": {"torch", "transformers"},
    "runtimes/torch/captured/attention_kernel.py": {"triton"},
    "runtimes/torch/captured/early_start.py": {"triton"},
    "runtimes/torch/captured/step_kernels.py": {"triton"},
    "exporter": {"ml_dtypes", "numpy", "onnx_ir", "rich", "tokenizers", "typer"},
    "exporter/sources/foreign_file.py": {"onnx"},  # names given twice are seen in the file alone
    "exporter/sources/model_proto.py": {"onnx"},
    "exporter/sources/proto_parts.py": {"onnx"},
    "exporter/sources/graph_types.py": {"onnx"},  # ONNX's checker and type inference
    "exporter/sources/shared_types.py": {"onnx"},  # which of an operator's inputs and outputs are of one type
    "exporter/skeleton.py": {"onnx"},  # what both of them, and ONNX Runtime, are given
    "exporter/tensorrt": {"tensorrt", "tensorrt_rtx"},
    "dlo_export": set(),
    "samples": set(),
    "benchmarks": {"benchmarks", "gguf", "ml_dtypes", "numpy", "onnx_ir", "onnxruntime", "torch", "transformers"}
    | {"llama_cpp", "onnxruntime_genai"}
    | {"matplotlib", "tokenizers"},
    "tests": {
        *("gguf", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "pytest", "rich"),
        *(
            "accelerate",
            "safetensors",
            "sentencepiece",
            "tensorrt_rtx",
            "tests",
            "tokenizers",
            "torch",
            "transformers",
            "triton",
            "typer",
        ),
    },
    "tests/benchmarks": {"benchmarks"},
    "tests/data": {"optimum"},
    "tests/modeling": {"benchmarks"},  # what a GPU is to show
    "tests/interop": {"benchmarks", "optimum", "polygraphy"},  # which writes what its program reads
    "tests/interop/launched": {"deepspeed"},
    "tests/plugins": {"tensorrt_bindings"},
    "tests/runtimes": {"cuda"},
}
TREES = sorted({folder.split("/")[0] for folder in PACKAGES})


def python_files(tree):
    """Of a top-level folder; dlo_export's links lead to the others."""
    return [file for file in sorted((ROOT / tree).rglob("*.py")) if file.resolve().is_relative_to(ROOT / tree)]


def imported_modules(source):
    """Full names of what a module imports: on top, in functions, for its types, and by a name in a string."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module="dlo_export", names=names):
                yield from (f"dlo_export.{alias.name}" for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.ImportFrom(level=level) if level:
                yield "." * level
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]):
                if called in {"import_module", "__import__"}:
                    yield name


def faults(path, source):
    """What a file imports that it may not.

    Args:
        path: Of the file, from the root.
        source: Its text.
    """
    allowed = set().union(*(names for place, names in PACKAGES.items() if path.is_relative_to(place)))
    room = path.parts[0]
    below = {room, *ROOMS.get(room, ROOMS)}
    for module in imported_modules(source):
        package, _, rest = module.partition(".")
        if package == "dlo_export":
            name = rest.split(".")[0]
            if name in ROOMS and name not in below:
                yield f"{path} imports {module}: {room} may use {', '.join(sorted(below))}"
        elif package not in allowed | sys.stdlib_module_names:
            yield f"{path} imports {module}: it may use {', '.join(sorted(allowed))}"


@pytest.mark.parametrize("tree", TREES)
def test_files_import_only_what_is_theirs_to_use(tree):
    files = python_files(tree)
    assert files
    assert not [fault for file in files for fault in faults(file.relative_to(ROOT), file.read_text())]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("checkpoints/config.py", "from dlo_export.modeling.routing import Routing"),
        ("checkpoints/config.py", "import torch"),
        ("checkpoints/config.py", "import gguf"),
        ("graph_passes/errors.py", "from onnx import defs"),
        ("graph_passes/errors.py", "from dlo_export import exporter"),
        ("plugins/tiles.py", "import dlo_export.runtimes.runner"),
        ("runtimes/runner.py", "def open():\n    import onnxruntime"),
        ("runtimes/runner.py", "importlib.import_module('tensorrt')"),
        ("exporter/export.py", "if TYPE_CHECKING:\n    import torch"),
        ("exporter/export.py", "import runtimes.runner"),
        ("exporter/export.py", "from benchmarks import measure"),
        ("benchmarks/common/measure.py", "from exporter.export import export_model"),
        ("tests/test_readme.py", "from .exporter import conftest"),
        ("tests/test_readme.py", "import numba"),
    ],
)
def test_an_import_is_refused_when_it_points_the_wrong_way(path, line):
    assert len(list(faults(Path(path), line))) == 1


def circle(files):
    """Modules of which each imports the next and the last is the first; none where there is no such circle.

    Args:
        files: Source by module.
    """
    try:
        TopologicalSorter({module: set(imported_files(source, files)) for module, source in files.items()}).prepare()
    except CycleError as err:
        return err.args[1]
    return []


def test_no_two_files_import_each_other():
    assert not circle({name_of(file): file.read_text() for tree in TREES for file in python_files(tree)})


def test_files_are_named_when_they_import_each_other():
    found = circle(
        {
            "dlo_export.a": "from dlo_export.b import x",
            "dlo_export.b": "def later():\n    from dlo_export import c",
            "dlo_export.c": "import dlo_export.a",
            "dlo_export.d": "from dlo_export.a import y",
            "dlo_export.e": "",
        }
    )
    assert set(found) == {"dlo_export.a", "dlo_export.b", "dlo_export.c"}


def name_of(file):
    """What a file is imported as."""
    tree, *rest = file.relative_to(ROOT).with_suffix("").parts
    return ".".join([*(("dlo_export", tree) if tree in ROOMS else (tree,)), *rest]).removesuffix(".__init__")


def imported_files(source, files):
    """Those of some modules that a module imports, also where `from package import module` names one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in files)
    yield from (module for module in imported_modules(source) if module in files)


def test_every_imported_package_is_declared_when_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {normalised(re.split(r"[\[<>=]", requirement)[0]) for requirement in requirements}
    # TensorRT's modules come with distributions that these two bring; DeepSpeed is not installed here.
    elsewhere = {"tensorrt": ["tensorrt"], "tensorrt_rtx": ["tensorrt-rtx"], "deepspeed": ["deepspeed"]}
    brought_by = packages_distributions() | elsewhere
    files = [file for tree in (*ROOMS, "dlo_export") for file in python_files(tree)]
    imported = {module.split(".")[0] for file in files for module in imported_modules(file.read_text())}
    imported -= sys.stdlib_module_names | {"dlo_export"}
    assert imported
    assert not {name for name in imported if declared.isdisjoint(map(normalised, brought_by[name]))}


def normalised(distribution):
    """A distribution's name as indexes compare it."""
    return distribution.lower().replace("_", "-")


def loaded_modules(module):
    """Top-level names in `sys.modules` of a process that imported one module."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "dlo_export.exporter.cli",
        "dlo_export.exporter.export",
        "dlo_export.checkpoints.formats.gguf_checkpoint",
        "dlo_export.checkpoints.adapter.adapter",
        "dlo_export.checkpoints.checkpoint_folder",
        "dlo_export.checkpoints.depth.expansion",
    ],
)
def test_export_path_does_not_import_pytorch(module):
    assert not loaded_modules(module) & {"torch", "transformers"}


def test_command_line_imports_no_library_that_is_slow_to_load():
    slow = {"numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "tokenizers"}
    assert not loaded_modules("dlo_export.exporter.cli") & slow
