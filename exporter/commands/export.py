"""`dlo-export MODEL`: a model in, an artefact out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtype_options import DTYPE_CHOICES
from dlo_export.exporter.commands.numbers import MAX_COUNT, byte_count, positive
from dlo_export.exporter.commands.shared_options import (
    AllowNonfinite,
    Force,
    ForceBase,
    OrtPluginLibrary,
    Verbose,
    naming_allow_nonfinite,
)
from dlo_export.graph_passes.lowerings.registry import lowering_names  # of names alone: keeps `dlo --help` quick

if TYPE_CHECKING:
    from dlo_export.exporter.export import ExportResult

NAME = "export"


class BackendOption(StrEnum):
    """Choices of --trt-backend."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    RTX = "rtx"


class CacheOption(StrEnum):
    """Choices of --trt-cache."""

    STATIC = "static"
    GROWING = "growing"


def default_output(model: str) -> Path:
    """MODEL's name with -dlo, in the current folder; beside MODEL where its path has no name, `.` or `..`."""
    path = Path(model)
    if path.name in ("", ".."):
        path = path.resolve()
        return path.with_name(f"{path.name}-dlo") if path.name else path
    return Path(f"{path.name.removesuffix('.gguf').removesuffix('.onnx')}-dlo")


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, .gguf or .onnx file, or hub id in the local cache.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Artefact folder; MODEL's name with -dlo unless given.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="DloAdapter (injected layers, routers), or a LoRA adapter of PEFT's.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar=f"<{'|'.join(DTYPE_CHOICES)}>",
            help="Of weights, KV cache and logits; auto is fp32 on a CPU, 16 bits on a GPU.",
        ),
    ] = "auto",
    lowering: Annotated[
        str,
        typer.Option(
            metavar=f"<{'|'.join(('auto', *lowering_names()))}>",
            help="What routed layers become; auto chooses by what was measured.",
        ),
    ] = "auto",
    last_logits: Annotated[
        bool,
        typer.Option("--last-logits", help="Logits of each sequence's last token only: quicker prompts, no scoring."),
    ] = False,
    remove_identity: Annotated[
        bool, typer.Option("--remove-identity", help="Leave layers out that pass everything on, with their cache.")
    ] = False,
    provider: Annotated[
        ProviderOption, typer.Option(help="Of ONNX Runtime, which model.onnx is made for: its type, its lowering.")
    ] = "cpu",
    trt: Annotated[bool, typer.Option("--trt", help="Build TensorRT engines too.")] = False,
    trt_backend: Annotated[
        BackendOption, typer.Option(help="rtx builds without a GPU; auto is tensorrt where it and a GPU are there.")
    ] = BackendOption.AUTO,
    trt_target: Annotated[
        str, typer.Option(help="GPUs, such as sm89,sm120; every GPU of the backend unless given.")
    ] = "",
    trt_max_batch: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Sequences per step at most.")] = 4,
    trt_max_sequence: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Tokens per sequence and step at most.")
    ] = 512,
    trt_max_cache: Annotated[
        int,
        typer.Option(
            min=1, max=MAX_COUNT, help="Tokens per sequence in the KV cache at most; decode costs grow with it."
        ),
    ] = 2048,
    trt_cache: Annotated[
        CacheOption, typer.Option(help="Updated in place, or one output per step.")
    ] = CacheOption.STATIC,
    trt_last_logits: Annotated[
        bool, typer.Option("--trt-last-logits", help="Logits of each sequence's last token only.")
    ] = False,
    trt_split: Annotated[bool, typer.Option("--trt-split", help="Two engines, prefill and decode.")] = False,
    trt_plugin_library: Annotated[Path | None, typer.Option(help="libdlo_plugins.so, for --lowering plugin.")] = None,
    trt_timeout: Annotated[
        float | None, typer.Option(callback=positive, help="Seconds before a build is killed.")
    ] = None,
    static_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_COUNT,
            help="Tokens per sequence in a KV cache that ONNX Runtime writes in place; on a GPU, for CUDA graphs.",
        ),
    ] = None,
    ort_plugin_library: OrtPluginLibrary = None,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Do not compare with PyTorch.")] = False,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="The graph alone; of a folder, config.json is enough.")
    ] = False,
    external_data_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of a weights file at most, such as 2GB or 4GiB; one file unless given."),
    ] = None,
    link_weights: Annotated[
        bool,
        typer.Option(
            "--link-weights",
            help="Hard links, not copies, of a graph's data files that stay as they are; onnx.load refuses such files.",
        ),
    ] = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    force_base: ForceBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print dlo_artifact.json to stdout.")] = False,
    verbose: Verbose = False,
) -> None:
    """Export a Llama, plain, deepened or routed, to an ONNX artefact that is proven equal to PyTorch.

    Mistral, Qwen2, Qwen3, SmolLM3, Granite and OLMo2 are exported alike: docs/checkpoints.md says what is read of each.
    """
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415
    from dlo_export.exporter.export import ExportRequest, export_model  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.exporter.tensorrt.plan import TensorRtRequest  # noqa: PLC0415
    from dlo_export.runtimes.artefact.description import description_json  # noqa: PLC0415

    targets = tuple(target.strip() for target in trt_target.split(",") if target.strip())
    if trt_target and not targets:
        raise InputError(
            f"--trt-target '{trt_target}': names no GPU",
            hint="give some, such as sm89,sm120, or leave it out for every GPU of the backend",
        )
    tensorrt = TensorRtRequest(
        backend=trt_backend.value,
        targets=targets,
        max_batch=trt_max_batch,
        max_sequence=trt_max_sequence,
        max_cache=trt_max_cache,
        cache=trt_cache.value,
        last_logits=trt_last_logits,
        split=trt_split,
        plugin_library=trt_plugin_library,
        timeout_s=trt_timeout,
    )
    if not trt and tensorrt != TensorRtRequest():
        raise InputError("--trt-… options ask for an engine, but --trt is not given", hint="add --trt")
    reporter = Reporter(verbose=verbose)
    request = ExportRequest(
        model=model,
        output=output or default_output(model),
        adapter=adapter,
        dtype=dtype,
        lowering=lowering,
        parity=not no_parity,
        weights=not no_weights,
        weight_file_bytes=None
        if external_data_size is None
        else byte_count("--external-data-size", external_data_size),
        force=force,
        allow_nonfinite=allow_nonfinite,
        force_base=force_base,
        trt=tensorrt if trt else None,
        ort_plugin_library=ort_plugin_library,
        last_logits=last_logits,
        remove_identity=remove_identity,
        static_cache=static_cache,
        link_weights=link_weights,
        provider=provider,
    )
    with naming_allow_nonfinite():
        result = export_model(request, reporter)
    if result.description.parity.verdict == "AMBIGUOUS":
        typer.echo("warning: parity is ambiguous: near-ties of routers fell the other way, see parity.json", err=True)
    if as_json:
        print_json(description_json(result.description, result.folder))
    else:
        _print_report(result)


def _print_report(result: ExportResult) -> None:
    from dlo_export.exporter.messages import printable  # noqa: PLC0415
    from dlo_export.runtimes.artefact.description import kept_data_summary  # noqa: PLC0415

    description = result.description
    if result.parity_summary:
        typer.echo(result.parity_summary)
    for engine in description.engines:
        build = engine.build
        typer.echo(
            f"{engine.file.relative_to(result.folder)}: {build.backend} {build.version}, "
            f"{', '.join(build.targets) or 'portable'}, {engine.dtype}, lowering {engine.lowering} "
            f"({engine.lowering_reason}), {build.bytes / 2**20:.0f} MB in {build.seconds:.0f} s"
        )
        if build.plugins == "twins":
            typer.echo("  its plugins are described, not contained: to run it, build again with --trt-plugin-library")
    if len(description.engines) > 1:
        extra = min(engine.build.bytes for engine in description.engines)
        typer.echo(f"--trt-split: both engines hold the weights, so the second one costs {extra / 2**20:.0f} MB")
    if removed := description.source.removed_layers:
        typer.echo(f"removed, since they pass everything on: layers {', '.join(map(str, removed))} of the source")
    if (kept := kept_data_summary(description, result.folder)) is not None:
        typer.echo(printable(kept))
    layers = description.layers
    counts = {kind: sum(bool(getattr(layer, kind)) for layer in layers) for kind in ("injected", "routed", "identity")}
    typer.echo(
        f"{result.folder}: {len(layers)} layers ({counts['injected']} injected, {counts['routed']} routed, "
        f"{counts['identity']} identity), lowering {description.lowering}, {result.bytes / 2**20:.0f} MB, "
        f"parity {description.parity.verdict}"
    )
