"""Who makes a graph of SmolLM2-135M, each in an environment of its own; what was made is kept under .peers/."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.common.peers import peer_program
from benchmarks.common.smollm2 import legacy_smollm2_folder, smollm2_folder
from benchmarks.common.workspace import REPOSITORY, WORKSPACE, temporary_folder
from dlo_export.checkpoints.errors import MachineError

GRAPHS: Final = WORKSPACE / "smollm2-graphs"
_DYNAMO: Final = REPOSITORY / "tests" / "interop" / "exporters" / "dynamo.py"
# Olive has no model type for Llama; this one's fusions are tried. The sizes it reads from nowhere else.
_FUSED_BY_OLIVE: Final = {"model_type": "gpt2", "opt_level": 0, "num_heads": 9, "hidden_size": 576}
_OF_OLIVE: Final = {"save_as_external_data": True}


class CannotBeMadeError(Exception):
    """The source's program is not here, or failed; the message is one line."""


@dataclasses.dataclass(frozen=True)
class ForeignSource:
    """A way to a graph.

    Attributes:
        dtype: "fp32", "fp16" or "int4", of its weights.
        write: Writes model.onnx into a folder that is there.
    """

    dtype: str
    write: Callable[[Path], None]

    def graph(self, name: str) -> Path:
        """The graph, made on first use, the checkpoint's config.json beside it.

        Args:
            name: Of the source.

        Raises:
            CannotBeMadeError: It is not there, and cannot be made.
        """
        folder = GRAPHS / name.replace(" ", "-")
        if not folder.exists():
            GRAPHS.mkdir(parents=True, exist_ok=True)
            with temporary_folder() as temporary:
                staging = temporary / "graph"
                staging.mkdir()
                self.write(staging)
                if not (staging / "model.onnx").is_file():
                    raise CannotBeMadeError(f"its program left {sorted(path.name for path in staging.iterdir())}")
                shutil.copy(smollm2_folder() / "config.json", staging)
                staging.rename(folder)
        return folder / "model.onnx"


def _optimum(folder: Path) -> None:
    task = ["--task", "text-generation-with-past"]
    _run([*_program("optimum", "optimum-cli"), "export", "onnx", "-m", legacy_smollm2_folder(), *task, folder])


def _torch(folder: Path) -> None:
    # onnxscript, which the exporter needs, is in that environment.
    _run([*_program("mobius", "python"), "-P", _DYNAMO, smollm2_folder(), folder / "model.onnx", "sdpa"])


def _mobius(provider: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _run([*_program("mobius", "mobius"), "build", "--config", smollm2_folder(), "--ep", provider, folder])

    return write


def _genai(precision: str, provider: str, *options: str) -> Callable[[Path], None]:
    """Of the builder; the provider is what the graph is for, and half precision is for a GPU alone."""

    def write(folder: Path) -> None:
        module: list[str | Path] = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            smollm2_folder(),
            "-o",
            folder,
        ]
        extra = ["--extra_options", *options] if options else []
        _run([*module, "-p", precision, "-e", provider, "-c", folder / "cache", *extra])

    return write


def _olive(pass_name: str, options: dict[str, object]) -> Callable[[Path], None]:
    """One of Olive's passes over optimum's graph."""

    def write(folder: Path) -> None:
        program = WORKSPACE / "olive" / "bin" / "olive"
        if not program.exists():
            raise CannotBeMadeError("no olive-ai 0.13 in .peers/olive")
        graph, config = SOURCES["optimum"].graph("optimum"), json.dumps(_OF_OLIVE | options)
        with temporary_folder() as temporary:
            command: list[str | Path] = [
                program,
                "run-pass",
                "--pass-name",
                pass_name,
                "--pass-config",
                config,
                "-m",
                graph,
            ]
            output = temporary / "output"
            # It leaves a cache where it stands.
            _run([*command, "-o", output, "--disable_telemetry"], cwd=temporary)
            made = next(iter(sorted(output.rglob("model.onnx"))), None)
            if made is None:
                raise CannotBeMadeError("Olive left no model.onnx")
            for path in made.parent.iterdir():
                shutil.move(path, folder)

    return write


SOURCES: Final = {
    "optimum": ForeignSource("fp32", _optimum),
    "torch.onnx.export": ForeignSource("fp32", _torch),
    "mobius default": ForeignSource("fp32", _mobius("default")),
    "mobius cpu": ForeignSource("fp32", _mobius("cpu")),
    "mobius cuda": ForeignSource("fp32", _mobius("cuda")),
    "mobius trt-rtx": ForeignSource("fp32", _mobius("trt-rtx")),
    "genai fp32": ForeignSource("fp32", _genai("fp32", "cpu")),
    "olive fused": ForeignSource("fp32", _olive("OrtTransformersOptimization", _FUSED_BY_OLIVE)),
    "genai fp16": ForeignSource("fp16", _genai("fp16", "cuda")),
    "genai int4": ForeignSource("int4", _genai("int4", "cpu")),
    "genai int4, exact": ForeignSource("int4", _genai("int4", "cpu", "accuracy_level=1")),
    "olive int4": ForeignSource("int4", _olive("OnnxBlockWiseRtnQuantization", {"block_size": 32})),
}
"""By name. Of genai's two int4 graphs the first asks for activations in 8 bits, as the builder does by default."""


def _program(environment: str, name: str) -> Sequence[Path]:
    try:
        return peer_program(environment, name)
    except (MachineError, OSError) as err:
        raise CannotBeMadeError(str(err).splitlines()[0]) from err


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    # Nothing of this environment's packages: other programs have their own.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        made = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=cwd, env=surroundings, timeout=900
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise CannotBeMadeError(str(err).splitlines()[0]) from err
    if made.returncode:
        print(made.stdout[-2000:], made.stderr[-4000:], sep="\n", file=sys.stderr)
        said = [line for line in made.stderr.splitlines() if line.strip()] or ["nothing said"]
        raise CannotBeMadeError(f"{Path(command[0]).name} ended with {made.returncode}: {said[-1].strip()[:200]}")
