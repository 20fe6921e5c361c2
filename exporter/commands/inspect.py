"""`dlo inspect`: what a graph consists of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlo_export.exporter.commands.shared_options import Tracebacks

if TYPE_CHECKING:
    from dlo_export.exporter.inspection import Inspection

NAME = "inspect"

_ATTENTION_MASKED = "nothing: its attention is computed and masked"
_SAVED = {
    "mlp": {
        "nothing": "nothing: its MLP is computed and masked",
        "tokens": "its part of the MLP",
        "steps": "the MLP, in steps without an active token",
    },
    "layer": {
        "nothing": "nothing: the layer is computed and masked",
        "tokens": "its part of the layer's projections and MLP",
        "steps": "the layer, in steps without an active token",
    },
    "attention": {
        "nothing": _ATTENTION_MASKED,
        "tokens": "its part of attention's query and output projections",
        "steps": "attention but for its keys and values, in steps without an active token",
    },
    "attention-active": {
        "nothing": _ATTENTION_MASKED,
        "tokens": "its part of attention's projections",
        "steps": "attention, in steps without an active token",
    },
}


def main(
    path: Annotated[Path, typer.Argument(help="Artefact folder, or any .onnx file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Tracebacks = False,
) -> None:
    """Show layers, bytes per part and operators of an artefact or any ONNX graph."""
    from dlo_export.exporter.inspection import inspect_model  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415

    del verbose
    inspection = inspect_model(path)
    if as_json:
        print_json(inspection.to_json())
    else:
        _print_tables(inspection)


def _layer_forms(layers: list[dict[str, Any]]) -> Iterator[str]:
    """How layers are written, a line for those in a row that are alike."""
    for (attention, weights, _), rows in itertools.groupby(
        layers, lambda row: (row["attention"], row["weights"], row["problem"] is None)
    ):
        alike = list(rows)
        first, last = alike[0]["index"], alike[-1]["index"]
        which = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield f"{which}: attention {attention}; weights {weights or 'not told apart'}"
        yield from (row["problem"] for row in alike if row["problem"] is not None)


def _description_lines(inspection: Inspection) -> Iterator[str]:
    """What an artefact says of itself."""
    from dlo_export.graph_passes.lowerings.registry import find_lowering  # noqa: PLC0415
    from dlo_export.runtimes.artefact.description import kept_data_summary  # noqa: PLC0415

    description = inspection.description
    if description is None:
        return
    removed = ", ".join(map(str, description.source.removed_layers))
    yield (
        f"{inspection.path.parent}: {description.source.kind} {description.source.name}, "
        + (f"without its layers {removed}, which pass everything on, " if removed else "")
        + f"{description.dtype}, lowering {description.lowering} ({description.lowering_reason}), "
        f"parity {description.parity.verdict} (parity.json: {inspection.parity_report or 'not there'})"
        + ("" if inspection.has_weights else "; no weights: a graph to look at, and to compile")
    )
    if (kept := kept_data_summary(description, inspection.path.parent)) is not None:
        yield kept
    if inspection.skips is not None:
        assert description.routing is not None, "or nothing would be skipped"
        # A lowering that knows MLPs only leaves the rest of a skipped layer masked.
        only_mlps = find_lowering(description.lowering, "onnxruntime-cpu").blocks == ("mlp",)
        saved = _SAVED["mlp" if only_mlps else description.routing.kind]
        yield f"a token that skips a layer saves {saved[inspection.skips]}"


def _print_tables(inspection: Inspection) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from dlo_export.checkpoints.router_thresholds import ONE_HALF  # noqa: PLC0415
    from dlo_export.exporter.messages import escaped, printable  # noqa: PLC0415
    from dlo_export.exporter.sources.untrained_routers import untrained_router_warning  # noqa: PLC0415

    console = Console()

    def tell(line: str) -> None:
        # Text of others: names in a graph, in a description, in an error.
        console.print(printable(line), markup=False, highlight=False)

    description = inspection.description
    for line in _description_lines(inspection):
        tell(line)
    if inspection.untrained_routers:
        assert description is not None, "or no router could be named"
        assert description.routing is not None, "or no router could be named"
        tell(f"warning: {untrained_router_warning(inspection.untrained_routers, description.routing.kind)}")
    if inspection.layers_problem:
        tell(f"no decoder layers: {inspection.layers_problem}")
    else:
        table = Table("layer", "injected", "routed", "identity", "MB")
        for row in inspection.layers:
            marks = [{True: "yes", False: "", None: "?"}[row[kind]] for kind in ("injected", "routed", "identity")]
            if row["threshold"] not in (None, ONE_HALF):
                marks[1] = f"above {row['threshold']:.4f}"
            table.add_row(str(row["index"]), *marks, f"{row['bytes'] / 2**20:.2f}")
        console.print(table)
        for line in _layer_forms(inspection.layers):
            tell(line)
    for engine in description.engines if description is not None else ():
        build = engine.build
        tell(
            f"{engine.file.relative_to(inspection.path.parent)}: {build.backend} {build.version}, "
            f"{', '.join(build.targets) or 'portable'}, {engine.dtype}, lowering {engine.lowering}, "
            f"{build.bytes / 2**20:.0f} MB"
        )
    for problem in inspection.engine_problems or ():
        tell(f"not usable here: {problem}")
    parts = Table("part", "MB")
    for part, size in inspection.bytes.items():
        parts.add_row(part, f"{size / 2**20:.2f}")
    console.print(parts)
    ops = Table("operator", "count")
    for name, count in inspection.ops.items():
        ops.add_row(Text(escaped(name)), str(count))
    console.print(ops)
