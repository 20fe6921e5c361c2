"""Options that mean the same in several commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dlo_export.checkpoints.device_options import DEVICE_FORM, ProviderOption, parse_device
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE


def _checked_device(option: str) -> str:
    """The option as it is, if it names a device."""
    return str(parse_device(option))


Force = Annotated[bool, typer.Option("--force", help="Replace an output of the same kind that dlo-export wrote.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take a model with NaN or infinity in its weights.")
]
ForceBase = Annotated[bool, typer.Option("--force-base", help="Take an adapter that was made from other weights.")]
Routing = Annotated[
    RoutingKind | None,
    typer.Option(
        help="What a token skips: the MLP, the whole layer, or attention, leaving keys and values all the same "
        "(attention) or none (attention-active). As the model's routers do, else mlp."
    ),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Time of each stage; tracebacks of bugs.")]
Tracebacks = Annotated[bool, typer.Option("-v", "--verbose", help="Tracebacks of bugs.")]
"""Verbose, of a command without stages: `cli.py` looks for it, whatever the command."""

Device = Annotated[
    str, typer.Option(metavar=f"<{DEVICE_FORM}>", callback=_checked_device, help="Where PyTorch computes.")
]
Provider = Annotated[
    ProviderOption | None, typer.Option(help="Of ONNX Runtime; the one the artefact was exported for unless given.")
]

OrtPluginLibrary = Annotated[
    Path | None,
    typer.Option(envvar=ORT_LIBRARY_VARIABLE, help="libdlo_ort.so, with which ONNX Runtime runs the plugin lowering."),
]


@contextmanager
def naming_allow_nonfinite() -> Iterator[None]:
    """Adds --allow-nonfinite to the hint of the refusals that it lifts: around what a command that has it does."""
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.checkpoints.finite_weights import NonFiniteWeightError  # noqa: PLC0415

    try:
        yield
    except NonFiniteWeightError as err:
        raise InputError(err.message, hint=f"{err.hint}; --allow-nonfinite takes it as it is") from err
