"""The C++ program generates what `dlo run` does, from every kind of artefact; the target is found in every way.

Skipped where there are no headers of ONNX Runtime's, or no cmake.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import onnx
import onnxruntime as ort
import pytest

import dlo_export
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.artefact.description import FORMAT_VERSION
from dlo_export.runtimes.generation.generate import generate
from tests.documents import ROOT, text_of
from tests.foreign_graphs import save_routed_adapter
from tests.ort_headers import ort_headers
from tests.plugins.ort_library import built_library
from tests.tiny_models import save_tiny_llama

PROMPT = [5, 9, 14, 3, 27, 31, 8, 44, 60, 2, 11]
STEPS = 12
ROUTED = (True, False, True)
CHECKS = Path(__file__).with_name("cpp_runtime_checks.cpp")
OPTIMUM = ROOT / "tests" / "data" / "optimum_llama"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is exported, and how."""

    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    export: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def library(self) -> Path | None:
        """The plugin library where it needs one."""
        return built_library() if self.export.get("lowering") == "plugin" else None


KINDS = {
    "plain": Kind({"tie": True}, {"last_logits": True}),
    "mlp, compact": Kind({"routed": ROUTED, "thresholds": {0: 0.4}}),
    "mlp, if": Kind({"routed": ROUTED, "rescale": False}, {"lowering": "if"}),
    "mlp, plugin": Kind({"routed": ROUTED}, {"lowering": "plugin"}),
    "layer": Kind({"routed": ROUTED, "model_type": "llama_dlo"}),
    "layer, if": Kind({"routed": ROUTED, "model_type": "llama_dlo"}, {"lowering": "if"}),
    "attention": Kind({"routed": ROUTED, "model_type": "llama_dlo_attn", "rescale": False}),
    "attention among the active": Kind(
        {"routed": ROUTED, "model_type": "llama_dlo_attn", "routing_kv": "active", "rescale": False}, {"lowering": "if"}
    ),
    "static cache": Kind({"routed": ROUTED, "head_dim": 16}, {"static_cache": 24, "lowering": "masked"}),
    "static cache, fp16": Kind({"routed": (False,) * 3, "head_dim": 16}, {"static_cache": 24, "dtype": "fp16"}),
    "static cache, plugin": Kind({"routed": ROUTED, "head_dim": 16}, {"static_cache": 24, "lowering": "plugin"}),
    "static cache, layer, if": Kind(
        {"routed": ROUTED, "model_type": "llama_dlo", "head_dim": 16}, {"static_cache": 24, "lowering": "if"}
    ),
    "static cache, attention, compact": Kind(
        {"routed": ROUTED, "model_type": "llama_dlo_attn", "rescale": False, "head_dim": 16},
        {"static_cache": 24, "lowering": "compact"},
    ),
}


def run(command: list[str | Path], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)


def build(source: Path, folder: Path, *options: str, target: str = "all") -> Path:
    """Configures and builds a target with cmake, warnings being errors; returns the folder."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*")
    places = [f"-DORT_INCLUDE={ort_headers()}", f"-DORT_LIBRARY={library}"]
    for command in (
        [
            "cmake",
            "-S",
            source,
            "-B",
            folder,
            *places,
            "-DCMAKE_BUILD_TYPE=Debug",
            "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
            "-DCMAKE_CXX_FLAGS=-Wall -Wextra -pedantic -Werror",
            *options,
        ],
        ["cmake", "--build", folder, "--target", target],
    ):
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """samples/cpp_onnxruntime, which takes the target in by add_subdirectory."""
    return build(ROOT / "samples" / "cpp_onnxruntime", tmp_path_factory.mktemp("sample")) / "generate"


def exported(folder: Path, kind: Kind) -> Path:
    model = save_tiny_llama(folder / "model", **kind.model)
    request = ExportRequest(
        str(model), folder / "artefact", parity=False, ort_plugin_library=kind.library, **kind.export
    )
    export_model(request, Reporter())
    return folder / "artefact"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("artefact"), KINDS["mlp, compact"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_program_generates_the_runners_tokens_when_given_an_artefact(program: Path, kind: Kind, tmp_path: Path) -> None:
    library = kind.library
    folder = exported(tmp_path, kind)
    with open_artefact(folder, plugin_library=library) as runner:
        expected = generate(runner, [PROMPT], max_new_tokens=STEPS, prefill_tokens=4)
    given = ["--tokens", ",".join(map(str, PROMPT)), "--steps", str(STEPS), "--prefill", "4", "--no-end", "--json"]
    result = run([program, folder, *given, *(["--plugin-library", library] if library else [])])
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["tokens"] == expected.sequences[0]
    assert len(answer["step_ms"]) == STEPS - 1
    rates = {int(layer): rate for layer, rate in answer["active_rate"].items()}
    assert rates == pytest.approx(expected.stats.active_rate, abs=1e-6)
    if any(kind.model.get("routed", [])):
        assert 0 < sum(rates.values()) / len(rates) < 1, "the comparison must see tokens that run and tokens that skip"


def test_program_generates_the_runners_tokens_when_the_graph_was_another_exporters(
    program: Path, tmp_path: Path
) -> None:
    adapter = save_routed_adapter(OPTIMUM / "model.onnx", tmp_path / "adapter")
    folder = tmp_path / "artefact"
    export_model(ExportRequest(str(OPTIMUM / "model.onnx"), folder, adapter=adapter, parity=False), Reporter())
    with open_artefact(folder) as runner:
        expected = generate(runner, [PROMPT], max_new_tokens=STEPS).sequences[0]
    result = run([program, folder, "--tokens", ",".join(map(str, PROMPT)), "--steps", str(STEPS), "--no-end"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ",".join(map(str, expected))


def test_program_prints_ids_and_rates_when_it_stops_at_an_end_token(program: Path, artefact: Path) -> None:
    whole = run([program, artefact, "--tokens", "5,6,7", "--steps", "6", "--no-end"])
    tokens = [int(token) for token in whole.stdout.split(",")]
    (artefact / "generation_config.json").write_text(json.dumps({"eos_token_id": [95, tokens[2]]}))
    ended = run([program, artefact, "--tokens", "5,6,7", "--steps", "6"])
    end = tokens.index(tokens[2]) + 1
    assert [int(token) for token in ended.stdout.split(",")] == tokens[:end]
    assert re.search(rf"3 prompt tokens in .* s, {end} new ones at .* tokens/s\nactive, layer 0: .*%\n", ended.stderr)


def test_program_draws_the_likeliest_token_when_only_that_may_be_drawn(program: Path, artefact: Path) -> None:
    command = [program, artefact, "--tokens", "5,6,7", "--steps", "6", "--no-end", "--no-scores"]
    greedy = run(command).stdout
    assert greedy
    for choice in (["--top-k", "1"], ["--top-p", "0.000001"]):
        assert run([*command, "--temperature", "9", *choice]).stdout == greedy
    drawn = {run([*command, "--temperature", "9", "--seed", str(seed)]).stdout for seed in (1, 1, 2)}
    assert len(drawn) == 2
    assert greedy not in drawn


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes a copy of dlo_artifact.json."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / "dlo_artifact.json").read_text())
        change(values)
        (folder / "dlo_artifact.json").write_text(json.dumps(values))

    return apply


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def edited(edit: Callable[[onnx.GraphProto], object]) -> Callable[[Path], object]:
    """Changes a copy of model.onnx, and the size that the description has of it."""

    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        edit(model.graph)
        content = model.SerializeToString()
        (folder / "model.onnx").write_bytes(content)
        changed(lambda values: values["files"][0].update(bytes=len(content)))(folder)

    return apply


def named(values: Iterable[onnx.ValueInfoProto], name: str) -> onnx.TypeProto.Tensor:
    """The declared type of an input or output."""
    return next(value.type.tensor_type for value in values if value.name == name)


def replaced(name: str, place: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in a file's place."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        place(folder / name)

    return apply


def flattened(graph: onnx.GraphProto) -> None:
    """Logits of two dimensions in place of three, which nothing declares."""
    node = next(node for node in graph.node if "logits" in node.output)
    node.output[list(node.output).index("logits")] = "cube"
    graph.node.append(onnx.helper.make_node("Flatten", ["cube"], ["logits"]))
    named(graph.output, "logits").ClearField("shape")


def resized(folder: Path) -> None:
    """A graph of the described size that is none."""
    (folder / "model.onnx").write_bytes(b"\xff" * (folder / "model.onnx").stat().st_size)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda folder: (folder / "dlo_artifact.json").unlink(), "dlo_artifact.json: cannot be read"),
    "no JSON": (written("dlo_artifact.json", b'{\n"a": [1, 2,]}'), "is no JSON: no value in line 2, column 12"),
    "cut short": (written("dlo_artifact.json", b'{"a": "b'), "is no JSON: a text that does not end in line 1"),
    "nested": (written("dlo_artifact.json", b"[" * 9000), "is no JSON: lists or objects nested too deep"),
    "twice": (written("dlo_artifact.json", b'{"a": 1, "a": 2}'), 'is no JSON: "a" a second time'),
    "half a character": (written("dlo_artifact.json", b'{"a": "\\ud800"}'), "is no JSON: no '\\'"),
    "other format": (
        changed(lambda values: values.update(format_version=3)),
        f"format_version is 3, expected {FORMAT_VERSION}",
    ),
    "no field": (changed(lambda values: values.pop("lowering")), "dlo_artifact.json: lowering is missing"),
    "wrong field": (
        changed(lambda values: values["layers"][1].update(injected="no")),
        'layers[1].injected is "no", expected true or false',
    ),
    "no interface": (
        changed(lambda values: values.pop("interface")),
        "dlo_artifact.json: interface is missing",
    ),
    "stray threshold": (
        changed(lambda values: values["routing"].update(router_thresholds={"1": 0.4})),
        "routing.router_thresholds.1 is 0.4, expected no entry: that layer is not routed",
    ),
    "huge threshold": (
        changed(lambda values: values["routing"].update(router_thresholds={"0": 10**999})),
        "routing.router_thresholds.0 is 10000",
    ),
    "threshold of no score": (
        changed(lambda values: values["routing"].update(router_thresholds={"0": 1.5})),
        "router_thresholds.0 is 1.5, expected a score above 0 and below 1",
    ),
    "endless text": (
        changed(lambda values: values.update(dtype="x" * 99999)),
        f'dtype is "{"x" * 60}…", expected one of',
    ),
    "file of no name": (
        changed(lambda values: values["files"][1].update(name="")),
        'files[1].name is "", expected a file inside the artefact',
    ),
    "file elsewhere": (
        changed(lambda values: values["files"][1].update(name="../artefact/model.onnx.data")),
        "expected a file inside the artefact",
    ),
    "file not listed": (
        changed(lambda values: values["files"].pop(0)),
        "files is a list, expected one that names model.onnx",
    ),
    "fewer layers": (
        changed(lambda values: values["routing"].update(layers=[0])),
        "model.onnx: has a router in layer 2, which dlo_artifact.json does not call routed",
    ),
    "folder for a file": (
        replaced("dlo_artifact.json", Path.mkdir),
        "dlo_artifact.json: cannot be read: Is a directory",
    ),
    "device for a file": (
        replaced("generation_config.json", lambda path: path.symlink_to("/dev/zero")),
        "generation_config.json: cannot be read: ",
    ),
    "wrong context": (written("config.json", b'{"max_position_embeddings": "long"}'), "max_position_embeddings is"),
    "logits of two dimensions": (edited(flattened), "output logits is not [batch, tokens, vocabulary] of floats"),
    "state of another size": (
        edited(lambda graph: named(graph.output, "present.1.key").shape.dim.add()),
        "output present.1.key is of another type or size than input past_key_values.1.key",
    ),
    "state that does not grow": (
        edited(lambda graph: setattr(named(graph.output, "present.1.key").shape.dim[2], "dim_value", 7)),
        "output present.1.key is of another type or size than input past_key_values.1.key",
    ),
    "state of enormous size": (
        edited(lambda graph: setattr(named(graph.input, "past_key_values.1.key").shape.dim[3], "dim_value", 2**62)),
        "input past_key_values.1.key is not [batch, heads, tokens, head_dim]",
    ),
    "ids of another type": (
        edited(lambda graph: setattr(named(graph.input, "position_ids"), "elem_type", onnx.TensorProto.INT32)),
        "model.onnx",
    ),
    "one input more": (
        edited(lambda graph: graph.input.append(onnx.helper.make_tensor_value_info("more", 1, [1]))),
        "input more is none that this header feeds",
    ),
    "scores of another size": (
        edited(
            lambda graph: next(node for node in graph.node if "logits" in node.output).metadata_props.extend(
                [
                    onnx.StringStringEntryProto(key="dlo.role", value="router_scores"),
                    onnx.StringStringEntryProto(key="dlo.layer", value="2"),
                ]
            )
        ),
        "output logits is of another size or type than a step's",
    ),
    "other layers": (
        changed(lambda values: values["routing"].update(layers=[0, 1], router_thresholds={})),
        "model.onnx: has no router in layer 1, which dlo_artifact.json calls routed",
    ),
    "wrong provider": (
        changed(lambda values: values.update(provider="tpu")),
        'dlo_artifact.json: provider is "tpu", expected one of cpu, cuda',
    ),
    "no weights": (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx.data: cannot be read"),
    "weights cut": (written("model.onnx.data", b"x"), "model.onnx.data: was changed: it has 1 bytes, expected"),
    "no graph": (resized, "model.onnx: is no ONNX graph, or is cut short"),
    "wrong end": (written("generation_config.json", b'{"eos_token_id": ["</s>"]}'), 'eos_token_id[0] is "</s>"'),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_program_names_file_and_field_when_an_artefact_is_damaged(
    program: Path, artefact: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(artefact, tmp_path / "damaged"))
    damage(folder)
    result = run([program, folder, "--tokens", "5"])
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert message in result.stderr
    assert "\nhint: " in result.stderr or "provider" in message


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: generate ARTEFACT --tokens 1,2,3"),
        (["--tokens", "1,x"], 2, "--tokens got 'x', expected a number >= 0"),
        (["--tokens", "1", "--steps", "-3"], 2, "--steps got '-3', expected a number >= 0"),
        (["--tokens", "1", "--step", "3"], 2, "--step is unknown"),
        (["--tokens", "1", "--steps"], 2, "--steps is unknown or lacks its value"),
        (["--tokens", "1", "--top-p", "2"], 2, "top-p is 2.000000, expected 0 < top-p <= 1"),
        (["--tokens", "1,96,97"], 2, "token 97 is none of the model's\n\nhint: they end at 96"),
        (["--tokens", "99999999999999999999"], 2, "--tokens got '99999999999999999999'"),
        (["--tokens", ""], 2, "an artefact and --tokens are needed"),
        (["--tokens", "1", "--prefill", "0"], 2, "prefill in steps of 0 tokens"),
        (["--tokens", "1", "--provider", "cuda"], 4, "CUDA does not start in this ONNX Runtime: "),
    ],
)
def test_program_ends_with_the_code_of_the_fault_when_it_cannot_run(
    program: Path, artefact: Path, arguments: list[str], code: int, message: str
) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers() and code == 4:
        pytest.skip("this ONNX Runtime has CUDA")
    result = run([program, artefact, *arguments])
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr


def test_program_refuses_before_the_first_token_what_a_static_cache_does_not_hold(
    program: Path, tmp_path: Path
) -> None:
    folder = exported(tmp_path, KINDS["static cache"])
    for tokens, steps, hint in ((20, 6, "--steps 5 or less"), (25, 1, "a shorter prompt")):
        result = run([program, folder, "--tokens", ",".join(["5"] * tokens), "--steps", str(steps), "--no-end"])
        assert (result.returncode, result.stdout) == (2, "")
        assert f"a prompt of {tokens} tokens and {steps} new ones, its static cache holds 24" in result.stderr
        assert f"give {hint}, or export with a larger --static-cache" in result.stderr
    result = run([program, folder, "--tokens", ",".join(["5"] * 20), "--steps", "5", "--no-end"])
    assert (result.returncode, len(result.stdout.split(","))) == (0, 5)


def test_program_says_what_a_static_cache_takes_when_no_memory_holds_it(program: Path, tmp_path: Path) -> None:
    folder, slots, total = exported(tmp_path, KINDS["static cache"]), 2**30, 0

    def grow(graph: onnx.GraphProto) -> None:
        nonlocal total
        for values in (graph.input, graph.output):
            for value in values:
                if value.name.startswith(("past_key_values.", "present.")):
                    sizes = value.type.tensor_type.shape.dim
                    sizes[2].dim_value, sizes[3].dim_value = slots, 2**16  # more than a processor can address
                    total += slots * sizes[1].dim_value * sizes[3].dim_value * 4 // 2  # past and present are one

    edited(grow)(folder)
    assert total > 2**50
    result = run([program, folder, "--tokens", "5,6", "--steps", "2", "--no-end"])
    assert (result.returncode, result.stdout) == (4, ""), result.stderr
    assert f"{folder}: no memory: a KV cache of {slots} slots takes {total} bytes" in result.stderr
    assert "hint: export with a smaller --static-cache" in result.stderr


def test_program_asks_for_the_library_when_an_artefact_needs_one(program: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path, KINDS["mlp, plugin"])
    for given, message in (
        ((), "are in libdlo_ort.so alone"),
        (["--plugin-library", "none.so"], "none.so: cannot be used"),
    ):
        result = run([program, folder, "--tokens", "5", *given])
        assert result.returncode == 4, result.stderr
        assert message in result.stderr


def documented(folder: Path, edit: Callable[[str], str] = str) -> Path:
    """The program of docs/cpp.md, its CMakeLists.txt edited."""
    blocks = dict(re.findall(r"^```(cmake|cpp)\n(.*?)^```", text_of("docs/cpp.md"), flags=re.MULTILINE | re.DOTALL))
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(edit(blocks["cmake"]))
    (folder / "main.cpp").write_text(blocks["cpp"])
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target, installed into a folder of its own."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    folder = tmp_path_factory.mktemp("installed")
    prefix = folder / "prefix"
    install = ["-S", ROOT / "runtimes" / "cpp", "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
    for command in (["cmake", *install], ["cmake", "--install", folder / "build"]):
        result = run(command)
        assert result.returncode == 0, result.stderr
    return prefix


def test_documented_program_runs_when_the_target_is_installed(artefact: Path, installed: Path, tmp_path: Path) -> None:
    """Under the parent's own standard, in two units of one program, and where another part brings the target again."""
    fetched = re.compile(r"include\(FetchContent\).*?MakeAvailable\(\w+\)", re.DOTALL)
    found = f"find_package(dlo_runtime 0.1 REQUIRED)\nadd_subdirectory({ROOT}/runtimes/cpp again)"
    units = f"add_executable(checks {CHECKS} second.cpp)\ntarget_link_libraries(checks PRIVATE dlo::runtime)\n"
    source = documented(tmp_path / "source", lambda script: fetched.sub(found, script) + units)
    (source / "second.cpp").write_text("#include <dlo/runtime.h>\n")
    folder = build(source, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}", "-DCMAKE_CXX_STANDARD=20")
    (tmp_path / "artefact").symlink_to(artefact)
    result = run([folder / "continue_text"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"(\d+ )+\n(layer \d: \d+ of \d+ tokens active\n)+", result.stdout)
    checked = run([folder / "checks", artefact, exported(tmp_path / "static", KINDS["static cache"])])
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_documented_program_runs_when_it_is_compiled_without_cmake(artefact: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"^g\+\+ .*", text_of("docs/cpp.md"), flags=re.MULTILINE)
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    source = documented(tmp_path / "source")
    # As an installed library has them; the Python package has the file alone.
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (source / name).symlink_to(library)
    places = {
        "runtimes/cpp": f"{ROOT}/runtimes/cpp",
        "/opt/onnxruntime/include": str(ort_headers()),
        "/opt/onnxruntime/lib": str(source),
    }
    for place, here in places.items():
        assert place in command
        command = command.replace(place, here)
    compiled = run(command.split(), source)
    assert (compiled.returncode, compiled.stderr) == (0, "")
    (source / "artefact").symlink_to(artefact)
    result = run([source / "continue_text"], source)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"(\d+ )+\n(layer \d: \d+ of \d+ tokens active\n)+", result.stdout)


def test_documented_project_has_the_target_when_it_fetches_the_repository(tmp_path: Path) -> None:
    """As the document shows it, but that the repository is here already."""
    build(
        documented(tmp_path / "source"),
        tmp_path / "build",
        f"-DFETCHCONTENT_SOURCE_DIR_DLO_EXPORT={ROOT}",
        target="help",
    )


def found_by(project: str, folder: Path, installed: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configures a project that needs no compiler and looks for the installed target."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(f'{project}\nmessage(STATUS "found: ${{dlo_runtime_FOUND}}")\n')
    return run(["cmake", "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={installed}", *options])


def test_target_is_found_when_the_project_has_old_policies_and_sets_plain_variables(
    installed: Path, tmp_path: Path
) -> None:
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*")
    project = (
        "cmake_minimum_required(VERSION 3.10)\nproject(old LANGUAGES NONE)\n"
        f"set(ORT_INCLUDE {ort_headers()})\nset(ORT_LIBRARY {library})\nfind_package(dlo_runtime REQUIRED)"
    )
    result = found_by(project, tmp_path / "old", installed)
    assert (result.returncode, "found: 1" in result.stdout) == (0, True), result.stderr


def test_target_is_not_found_and_says_why_when_onnxruntime_does_not_fit(installed: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "onnxruntime_cxx_api.h").touch()
    (newer / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 999\n")
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*")
    older = tmp_path / "libonnxruntime.so.1.22.4"
    older.touch()
    package = tmp_path / "package"
    package.mkdir()
    (package / "onnxruntimeConfig.cmake").write_text("add_library(onnxruntime::onnxruntime INTERFACE IMPORTED)\n")
    (package / "onnxruntimeConfigVersion.cmake").write_text('set(PACKAGE_VERSION "1.21.0")\n')
    project = "cmake_minimum_required(VERSION 3.21)\nproject(user LANGUAGES NONE)\nfind_package(dlo_runtime {})"
    cases = {
        "nothing": ([], "ONNX Runtime is not found"),
        "newer headers": (
            [f"-DORT_INCLUDE={newer}", f"-DORT_LIBRARY={library}"],
            "headers of ONNX Runtime 1.999, newer",
        ),
        "older library": ([f"-DORT_INCLUDE={newer}", f"-DORT_LIBRARY={older}"], "too old, expected 1.23.1 or newer"),
        "older package": ([f"-Donnxruntime_DIR={package}"], "ONNX Runtime 1.21.0 in"),
    }
    for name, (options, message) in cases.items():
        result = found_by(project.format("REQUIRED"), tmp_path / name, installed, *options)
        assert result.returncode == 1, name
        assert message in " ".join(result.stderr.split()), result.stderr
    optional = found_by(project.format("QUIET"), tmp_path / "optional", installed)
    assert (optional.returncode, "found: 0" in optional.stdout) == (0, True), optional.stderr


def test_configuration_names_the_variable_when_onnxruntime_is_not_found(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    sample = ROOT / "samples" / "cpp_onnxruntime"
    for given, message in ([], "ONNX Runtime is not found"), (["-DORT_INCLUDE=/none"], "ORT_INCLUDE is '/none'"):
        result = run(["cmake", "-S", sample, "-B", tmp_path / str(len(given)), *given])
        assert result.returncode == 1
        assert message in result.stderr


def test_headers_say_what_the_package_does_when_both_have_a_table() -> None:
    headers = {path.name: path.read_text() for path in (ROOT / "runtimes" / "cpp" / "include" / "dlo").iterdir()}
    assert f"kFORMAT_VERSION = {FORMAT_VERSION};" in headers["artefact.h"]
    (least,) = re.findall(r"set\(dlo_least ([\d.]+)\)", (ROOT / "runtimes/cpp/onnxruntime.cmake").read_text())
    assert f"std::vector{{{least.replace('.', ', ')}}}" in headers["model.h"]
    project = f"project(dlo_runtime VERSION {dlo_export.__version__} "
    assert project in (ROOT / "runtimes" / "cpp" / "CMakeLists.txt").read_text()
    providers = ", ".join(f'"{provider}"' for provider in get_args(ProviderOption))
    assert f'description["provider"].oneOf({{{providers}}})' in headers["artefact.h"]
