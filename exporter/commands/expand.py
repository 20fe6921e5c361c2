"""`dlo expand`: deepen a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dlo_export.exporter.commands.shared_options import Force, Routing, Verbose

NAME = "expand"


class Method(StrEnum):
    """Choices of --method."""

    TLI = "tli"
    INTERLEAVE = "interleave"
    LLAMA_PRO = "llama-pro"
    DUS = "dus"


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, .gguf file, or hub id in the local cache.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint (or adapter) folder to make.")],
    method: Annotated[Method, typer.Option(help="Where the new layers go.")] = Method.TLI,
    every: Annotated[int | None, typer.Option(help="tli: one new layer after every so many.")] = None,
    offset: Annotated[int | None, typer.Option(help="tli: layers left alone at the start.")] = None,
    source: Annotated[str | None, typer.Option(help="tli: prev, next, mean or slerp.")] = None,
    target_layers: Annotated[int | None, typer.Option(help="interleave: depth of the result.")] = None,
    groups: Annotated[int | None, typer.Option(help="llama-pro: groups the layers are cut into.")] = None,
    per_group: Annotated[int | None, typer.Option(help="llama-pro: new layers per group.")] = None,
    overlap: Annotated[int | None, typer.Option(help="dus: layers dropped on each side of the seam.")] = None,
    init: Annotated[str | None, typer.Option(help="tli, interleave: zero_out, copy, linear, slerp or random.")] = None,
    routers: Annotated[bool, typer.Option("--routers", help="Add an all-zero router to every layer.")] = False,
    routing: Routing = None,
    as_adapter: Annotated[bool, typer.Option("--adapter", help="Write an adapter, not a checkpoint.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of random inits.")] = 0,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Deepen a checkpoint with new layers (TLI, DLO's interleave, LLaMA-Pro, depth up-scaling)."""
    from dlo_export.checkpoints.adapter.adapter import save_adapter  # noqa: PLC0415
    from dlo_export.checkpoints.checkpoint_folder import save_checkpoint  # noqa: PLC0415
    from dlo_export.checkpoints.depth.expansion import expanded_config, expanded_tensors, expansion_adapter  # noqa: PLC0415
    from dlo_export.checkpoints.depth.layer_init import preserves_function  # noqa: PLC0415
    from dlo_export.checkpoints.depth.placements import placements  # noqa: PLC0415
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415
    from dlo_export.checkpoints.files.folder_kind import FolderKind  # noqa: PLC0415
    from dlo_export.checkpoints.files.output_check import check_output_folder, check_output_space  # noqa: PLC0415
    from dlo_export.checkpoints.finite_weights import finite_tensors  # noqa: PLC0415
    from dlo_export.checkpoints.llama_layer import router_name  # noqa: PLC0415
    from dlo_export.checkpoints.model_types import agreed_routing  # noqa: PLC0415
    from dlo_export.checkpoints.opening import open_checkpoint  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.exporter.sources.untrained_routers import untrained_router_warning  # noqa: PLC0415

    if routing is not None and not routers:
        raise InputError(f"--routing {routing}: no routers are added", hint="give --routers too")
    given: dict[str, Any] = {
        "every": every,
        "offset": offset,
        "source": source,
        "target_layers": target_layers,
        "groups": groups,
        "per_group": per_group,
        "overlap": overlap,
        "init": init,
    }
    reporter = Reporter(verbose=verbose)
    makes = FolderKind.ADAPTER if as_adapter else FolderKind.CHECKPOINT
    check_output_folder(output, overwrite=force, makes=makes, inputs=[Path(model)])
    with open_checkpoint(model) as checkpoint:
        for warning in checkpoint.warnings:
            reporter.warn(warning)
        raw = checkpoint.config.raw
        # Named as the base names them; those of the result have other numbers.
        tensors = finite_tensors(checkpoint.tensors, checkpoint.path)
        plan = placements(
            method.value,
            checkpoint.config.num_layers,
            **{name: value for name, value in given.items() if value is not None},
        )
        own = checkpoint.config.routing
        kind = agreed_routing(None if own is None else own.kind, routing)
        untrained = [at for layer, at in enumerate(plan.original_positions) if router_name(layer) not in tensors]
        # A new layer that adds nothing loses nothing either where it is skipped.
        untrained += [layer.position for layer in plan.injected_layers if not preserves_function(layer.init)]
        if routers and untrained:
            reporter.warn(untrained_router_warning(sorted(untrained), kind))
        options: dict[str, Any] = {
            "zero_routers": routers,
            "seed": seed,
            "initializer_range": checkpoint.config.initializer_range,
        }
        adapter = expansion_adapter(tensors, plan, routing=kind, **options) if as_adapter else None
        written = expanded_tensors(tensors, plan, **options) if adapter is None else adapter.tensors
        sizes = [math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in written.values()]
        check_output_space(output, sum(sizes))
        if adapter is not None:
            with reporter.stage("adapter"):
                adapter = dataclasses.replace(adapter, base_sha256=checkpoint.sha256())
                save_adapter(adapter, output, overwrite=force)
        else:
            with reporter.bytes("checkpoint") as progress:
                save_checkpoint(
                    written,
                    output,
                    save_companions=checkpoint.save_companions,
                    config_changes=expanded_config(raw, plan, zero_routers=routers, routing=routing),
                    overwrite=force,
                    progress=progress,
                )
    positions = ", ".join(str(layer.position) for layer in plan.injected_layers)
    typer.echo(f"{output}: {plan.num_base_layers} → {plan.num_layers} layers, new at {positions}")
