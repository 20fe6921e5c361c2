"""Graphs of SmolLM2-135M that others exported: deepened and routed in place, each against itself and PyTorch.

Every source of benchmarks/common/foreign_sources.py makes its graph. Then, as `dlo-export model.onnx --adapter` does:

* six TLI layers (one after every five, zero_out) are put in: the logits must be the untouched graph's;
* one more adapter, the same for all sources, also has a router for each of the 36 layers. Compact and `if` must give
  the logits of their own masked form (the one whose norms are fused as theirs are, since a fused norm rounds in its own
  way), and all three every decision of the PyTorch model.

The PyTorch model has the weights found in the graph, in float64, dequantised where they are codes; its row says how far
it is off itself in float32. Each router but the first skips a tenth of the tokens, each layer others. A text is fed at
once, token by token behind a cache, and in a batch: left-padded, or of equal lengths where the graph's attention counts
tokens. Differences are the largest of a logit, and the largest share of the largest logit of its token, which is what
parity holds against its tolerances: SmolLM2's residual stream reaches 23,000, so that float32 rounds in its fourth
digit behind the point.

    python -m benchmarks.foreign_graphs --source optimum --source "genai int4"
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.common.foreign_sources import SOURCES, CannotBeMadeError, ForeignSource
from benchmarks.common.measure import print_report, versions
from benchmarks.common.routed_artefact import export
from benchmarks.common.routing import fit_routers, routable_model, router_tensors, tokens_active
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workspace import WORKSPACE
from dlo_export.checkpoints.adapter.adapter import DloAdapter, load_adapter, save_adapter
from dlo_export.checkpoints.depth.expansion import expanded_config, expanded_tensors, expansion_adapter
from dlo_export.checkpoints.depth.placements import ExpansionPlan, placements
from dlo_export.checkpoints.errors import DloError
from dlo_export.checkpoints.llama_layer import HEAD
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.artefact_runner import exposed_model, open_artefact
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.parity_check import as_it_was
from dlo_export.exporter.pipeline import build_model
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.weight_file import external_tensors, take_weights
from dlo_export.graph_passes.find.padding import takes_left_padding
from dlo_export.runtimes.artefact.description import MODEL_NAME
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.parity.cases import Case, step_feeds
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.torch.runner import TorchRunner

UNTOUCHED, ZERO_OUT, MASKED, SKIPPING = "untouched", "zero_out layers", "masked", ("compact", "if")
PYTORCH, EXACT = "PyTorch in float32", "PyTorch in float64"
# Of the logits: largest difference to the untouched graph by dtype, and to the graph's own masked form as a share of
# the token's largest logit.
INJECTED_BARS: Final = {"fp32": 1e-5, "fp16": 1e-3, "int4": 1e-3}
MASKED_BAR: Final = 1e-4
TOKENS: Final = 48
ACTIVE: Final = 0.9
HEADER: Final = (
    "source",
    "dtype",
    "form",
    "compared with",
    "largest difference",
    "of the token's largest logit",
    "bar",
    "from PyTorch, of the largest logit",
    "decisions that differ",
    "verdict",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a graph computes for one text.

    Attributes:
        logits: [real tokens, vocabulary].
        decisions: [routed layers, real tokens].
    """

    logits: np.ndarray
    decisions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart, over all texts.

    Attributes:
        largest: Of a logit.
        of_peak: Of a logit as a share of its token's largest one, which is at least 1.
    """

    largest: float
    of_peak: float

    @classmethod
    def between(cls, found: list[Outcome], expected: list[Outcome]) -> Difference:
        """Of what was found from what was expected."""
        apart = [np.abs(a.logits - b.logits).max(-1) for a, b in zip(found, expected, strict=True)]
        peaks = [np.maximum(np.abs(each.logits).max(-1), 1.0) for each in expected]
        shares = [float((a / b).max()) for a, b in zip(apart, peaks, strict=True)]
        return cls(max(float(each.max()) for each in apart), max(shares))


@dataclasses.dataclass(frozen=True)
class Row:
    """One form of one source's graph, over all texts; None where nothing was to be compared.

    Attributes:
        source: Its name.
        dtype: Of its weights.
        form: What was done to the graph.
        compared_with: What its logits are held against.
        difference: From that.
        bar: What `held` may be.
        held: The one of the two differences that the bar is for.
        from_pytorch: How far the logits are from the PyTorch model's in float64.
        flips: Decisions that are not the PyTorch model's.
        decisions: Of how many.
        refused: Why there is no such form, in the program's own words.
    """

    source: str
    dtype: str
    form: str
    compared_with: str = ""
    difference: Difference | None = None
    bar: float | None = None
    held: float | None = None
    from_pytorch: Difference | None = None
    flips: int | None = None
    decisions: int = 0
    refused: str = ""

    @property
    def verdict(self) -> str:
        """One word, or the reason."""
        if self.refused:
            return self.refused
        # Not "above the bar": what is no number misses it too.
        held = self.held is None or self.bar is None or self.held <= self.bar
        return "pass" if held and not self.flips else "missed"

    def cells(self) -> list[str]:
        """For the table."""
        own, pytorch = self.difference, self.from_pytorch
        values = (
            *((None, None) if own is None else (own.largest, own.of_peak)),
            self.bar,
            None if pytorch is None else pytorch.of_peak,
        )
        numbers = ["" if value is None else f"{value:.1e}" for value in values]
        flips = "" if self.flips is None else f"{self.flips} of {self.decisions}"
        return [self.source, self.dtype, self.form, self.compared_with, *numbers, flips, self.verdict]


def save_adapters(tokens: np.ndarray, layers: Path, routers: Path) -> ExpansionPlan:
    """Writes the layers as an adapter, and the layers with routers, fitted on the checkpoint's PyTorch model."""
    with open_checkpoint(str(smollm2_folder())) as checkpoint:
        plan = placements("tli", checkpoint.config.num_layers, every=5, init="zero_out")
        config = checkpoint.config.raw | expanded_config(checkpoint.config.raw, plan)
        model = routable_model(config, expanded_tensors(checkpoint.tensors, plan))
        wanted = tokens_active(ACTIVE, plan.num_layers, tokens.shape[1])
        wanted[0] = True  # the first MLP makes the embeddings usable, and skipping it magnifies rounding
        fit_routers(model, tokens, wanted)
        injected = expansion_adapter(checkpoint.tensors, plan)
        save_adapter(injected, layers)
        tensors = {**injected.tensors, **router_tensors(model)}
        save_adapter(dataclasses.replace(injected, is_dlo=(True,) * plan.num_layers, tensors=tensors), routers)
    return plan


def text_cases(tokens: np.ndarray, *, padded: bool) -> list[Case]:
    """The same text three ways; of the batch, both are its beginning, so routers know every token's stream."""
    whole = tokens[0]
    shorter = whole[: 31 if padded else len(whole)]
    batch = "left-padded batch, cached" if padded else "batch, cached"
    return [
        Case("at once", step_feeds([whole])),
        Case("token by token", step_feeds([whole], *[1] * (TOKENS // 2))),
        Case(batch, step_feeds([whole, shorter], 1, 1, 1, 1)),
    ]


def outcomes(runner: Runner, cases: list[Case]) -> list[Outcome]:
    """What a model computes for each text."""
    found = []
    for case in cases:
        runner.reset(case.batch)
        results = [runner.step(feed.input_ids, feed.attention_mask, feed.position_ids) for feed in case.feeds]
        logits = np.concatenate([result.logits for result in results], axis=1)
        layers, shape = runner.routed_layers, case.real.shape
        scores = [np.concatenate([result.router_scores[layer] for result in results], axis=1) for layer in layers]
        stacked = np.stack(scores) if scores else np.zeros((0, *shape), np.float32)
        found.append(Outcome(logits[case.real], stacked[:, case.real] > 0.5))
    return found


def pytorch_outcomes(
    graph: Path, adapter: DloAdapter, plan: ExpansionPlan, cases: list[Case], dtype: torch.dtype
) -> list[Outcome]:
    """What the PyTorch model computes that has the graph's own weights, deepened and routed by the adapter."""
    tensors = open_foreign_graph(graph).tensors
    # A head and an embedding that are quantised apart are tied no more.
    config = json.loads((graph.parent / "config.json").read_text()) | {"tie_word_embeddings": HEAD not in tensors}
    deepened = expanded_tensors(tensors, plan)
    model = routable_model(config | expanded_config(config, plan), deepened, dtype=dtype)
    for layer in adapter.routed_layers:
        router = model.model.router(layer)
        assert router is not None
        router.weight.data.copy_(router.weight.new_tensor(adapter.router(layer)))
    with TorchRunner(model) as reference:
        return outcomes(reference, cases)


def masked_form(graph: Path, adapter: Path, artefact: Path, lowering: str, cases: list[Case]) -> list[Outcome]:
    """What an artefact computes before its lowering, on its own weights."""
    with contextlib.closing(open_source(str(graph), adapter)) as source:
        dtype = graph_dtype(source.base.graph_dtype("auto"))
        model = build_model(source, "masked", dtype, compared_with=lowering)
        different = take_weights(model, external_tensors(ir.load(artefact / MODEL_NAME).graph))
        assert not different, f"{sorted(different)[:5]} are not the artefact's"
    with OnnxRuntimeRunner(exposed_model(model), weights_folder=artefact, allow_spinning=False) as runner:
        return outcomes(runner, cases)


def rows_of(name: str, source: ForeignSource, plan: ExpansionPlan, folder: Path) -> Iterator[Row]:
    """Makes a source's graph and holds each form of it against what it must equal.

    Args:
        name: Of the source.
        source: It.
        plan: Of the layers put in.
        folder: Holds the adapters "layers" and "routers"; artefacts are made in it.
    """
    blank = Row(name, source.dtype, UNTOUCHED)
    try:
        graph = source.graph(name)
    except CannotBeMadeError as err:
        yield dataclasses.replace(blank, refused=f"cannot be made here: {err}")
        return
    tokens = distinct_tokens(TOKENS)
    try:
        padded = takes_left_padding(open_foreign_graph(graph).model().graph)
        cases = text_cases(tokens, padded=padded)
        with (
            contextlib.closing(open_source(str(graph), folder / "layers")) as opened,
            OnnxRuntimeRunner(as_it_was(opened), weights_folder=graph.parent, allow_spinning=False) as runner,
        ):
            untouched = outcomes(runner, cases)
        adapter = load_adapter(folder / "routers")
        exact, rounded = (
            pytorch_outcomes(graph, adapter, plan, cases, dtype) for dtype in (torch.float64, torch.float32)
        )
    except DloError as err:
        yield dataclasses.replace(blank, refused=err.message)
        return
    own = Difference.between(rounded, exact)
    yield dataclasses.replace(blank, form=PYTORCH, compared_with=EXACT, difference=own, **_decided(rounded, exact))
    forms = [(ZERO_OUT, "layers", "auto"), *((form, "routers", form) for form in (MASKED, *SKIPPING))]
    for form, adapter_name, lowering in forms:
        row = dataclasses.replace(blank, form=form)
        try:
            artefact = export(graph, folder / "artefact", folder / adapter_name, lowering).parent
            with open_artefact(artefact, allow_spinning=False) as runner:
                found = outcomes(runner, cases)
            if form in SKIPPING:
                masked = masked_form(graph, folder / adapter_name, artefact, lowering, cases)
        except DloError as err:
            yield dataclasses.replace(row, refused=err.message)
            continue
        if form == ZERO_OUT:
            apart = Difference.between(found, untouched)
            bar = INJECTED_BARS[source.dtype]
            yield dataclasses.replace(row, compared_with=UNTOUCHED, difference=apart, bar=bar, held=apart.largest)
            continue
        if form in SKIPPING:
            apart = Difference.between(found, masked)
            row = dataclasses.replace(
                row, compared_with="its masked form", difference=apart, bar=MASKED_BAR, held=apart.of_peak
            )
        yield dataclasses.replace(row, from_pytorch=Difference.between(found, exact), **_decided(found, exact))


def _decided(found: list[Outcome], expected: list[Outcome]) -> dict[str, Any]:
    """Decisions that differ, and of how many."""
    pairs = list(zip(found, expected, strict=True))
    return {
        "flips": sum(int((a.decisions != b.decisions).sum()) for a, b in pairs),
        "decisions": sum(b.decisions.size for _, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", choices=tuple(SOURCES), help="may be given again; default: all")
    chosen = parser.parse_args().source or list(SOURCES)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        folder = Path(temporary)
        plan = save_adapters(distinct_tokens(TOKENS), folder / "layers", folder / "routers")
        for name in chosen:
            for row in rows_of(name, SOURCES[name], plan, folder):
                print(" | ".join(row.cells()), file=sys.stderr, flush=True)
                rows.append(row)
    record: list[dict[str, Any]] = [dataclasses.asdict(row) | {"verdict": row.verdict} for row in rows]
    print_report(
        "SmolLM2-135M's graphs of other exporters, deepened and routed in place",
        HEADER,
        [row.cells() for row in rows],
        {
            "layers": plan.num_layers,
            "tokens": TOKENS,
            "active_rate": ACTIVE,
            "rows": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai", "torch", "transformers"),
        },
    )
    if any(row.verdict == "missed" for row in rows):
        sys.exit("a graph misses a bar")


if __name__ == "__main__":
    main()
