"""Options that mean the same in several commands."""

from __future__ import annotations

from typing import Annotated

import typer

Force = Annotated[bool, typer.Option("--force", help="Replace an output of the same kind that dlo-export wrote.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Take a model with NaN or infinity in its weights.")
]
ForceBase = Annotated[bool, typer.Option("--force-base", help="Take an adapter that was made from other weights.")]
