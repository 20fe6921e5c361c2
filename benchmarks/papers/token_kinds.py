"""(e) Which layers, and which kinds of token, skip on real text."""

from __future__ import annotations

import keyword
from typing import Any

import numpy as np
import torch

from benchmarks.papers.budget import Piece
from benchmarks.papers.expansion_loss import pass_seconds
from benchmarks.papers.experiment import Experiment
from benchmarks.papers.subjects import saved_model
from benchmarks.papers.training import TrainingRun
from dlo_export.modeling.routing import is_active

PREFIX = "kinds-"
KINDS = ("first", "line break", "space", "number", "punctuation", "keyword", "word", "rest of a word")
"""Of tokens: a window's first; a keyword of Python's; the beginning of another word; what goes on with a word."""


def kind_pieces(experiment: Experiment, runs: list[TrainingRun]) -> list[Piece]:
    """Of every routed model that was kept."""
    kept = [run.name for run in runs if run.kept and run.target is not None]
    return [
        Piece(
            f"{PREFIX}{name}",
            lambda: 1.5 * pass_seconds(experiment),
            lambda name=name: skipped_by_kind(experiment, name),  # type: ignore[misc]
            (name,),
        )
        for name in kept
    ]


@torch.no_grad()
def skipped_by_kind(experiment: Experiment, name: str) -> dict[str, Any]:
    """Share of skipped tokens by layer and kind, over all held-out text."""
    model = experiment.placed(saved_model(experiment.results.model(name)))
    layers = model.config.routed_layers
    windows = torch.cat([*experiment.windows.values()])
    kinds = token_kinds(experiment.base.tokenizer, windows.numpy())
    counts = np.bincount(kinds.ravel(), minlength=len(KINDS))
    skipped = np.zeros((len(layers), len(KINDS)), np.int64)
    for window, kinds_of_window in zip(windows, kinds, strict=True):
        scores = model(window.unsqueeze(0).to(experiment.device), use_cache=False).router_scores
        for row, layer in enumerate(layers):
            skips = ~is_active(scores[layer], model.config.threshold(layer))[0].cpu().numpy()
            skipped[row] += np.bincount(kinds_of_window[skips], minlength=len(KINDS))
    shares = skipped / np.maximum(counts, 1)
    return {
        "tokens": dict(zip(KINDS, counts.tolist(), strict=True)),
        "layers": list(layers),
        "injected": [layer["position"] for layer in model.config.injected_layers or ()],
        "skipped": {
            str(layer): [round(value, 4) for value in row] for layer, row in zip(layers, shares.tolist(), strict=True)
        },
    }


def token_kinds(tokenizer: Any, windows: np.ndarray) -> np.ndarray:
    """Indices into `KINDS`, of the windows' shape, int64 [windows, length]."""
    texts = {token: tokenizer.decode([token]) for token in np.unique(windows).tolist()}
    kinds = np.empty(windows.shape, np.int64)
    for row, window in enumerate(windows.tolist()):
        before = ""
        for column, token in enumerate(window):
            text = texts[token]
            kinds[row, column] = KINDS.index("first" if column == 0 else _kind(text, before))
            before = text
    return kinds


def _kind(text: str, before: str) -> str:
    bare = text.strip()
    if not bare:
        return "line break" if "\n" in text else "space"
    if bare.isdigit():
        return "number"
    if not any(character.isalnum() for character in bare):
        return "punctuation"
    if text[0].isalnum() and before[-1:].isalnum():
        return "rest of a word"
    return "keyword" if keyword.iskeyword(bare) else "word"
