"""Options that mean the same in several commands."""

from __future__ import annotations

from typing import Annotated

import typer

from dlo_export.checkpoints.model_types import RoutingKind

Force = Annotated[bool, typer.Option("--force", help="Replace an output that dlo-export wrote.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take a model with NaN or infinity in its weights.")
]
ForceBase = Annotated[bool, typer.Option("--force-base", help="Take an adapter that was made from other weights.")]
Routing = Annotated[
    RoutingKind | None,
    typer.Option(help="What a token skips: the MLP, or the whole layer. As the model's routers do, else mlp."),
]
