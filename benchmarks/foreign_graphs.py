"""Graphs of SmolLM2-135M that others exported: deepened and routed in place, each against itself and PyTorch.

Every source of benchmarks/common/foreign_sources.py makes its graph. Then, as `dlo-export model.onnx --adapter` does:

* six TLI layers (one after every five, zero_out) are put in: the logits must be the untouched graph's;
* one more adapter, the same for all sources, also has a router for each of the 36 layers. Compact and `if` must give
  the logits of their own masked form (the one whose norms are fused as theirs are, since a fused norm rounds in its own
  way), and all three every decision of the PyTorch model.

The PyTorch model has the weights found in the graph, in float64, dequantised where they are codes; its row says how far
it is off itself in float32. Logits are compared with its under its decisions, so that a flipped one counts once.

A graph in float16, or one that rounds activations to 8 bits, is itself off by more than some bars allow. How far, its
own row says: all MLPs run, which is the untouched graph, and routers listen; and PyTorch's in float16. What misses a
bar counts as the graph's own rounding in one of two cases, else as missed: it is at most twice as far from PyTorch in
float64 as these are, with at most twice as many other decisions; or it rounds activations to 8 bits, and the same file,
told not to (`accuracy_level` of its nodes), decides all as PyTorch does and is within the bar for masked forms.

Each router but the first skips a tenth of the tokens, each layer others. A text is fed at
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
from collections.abc import Iterator, Sequence
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
from benchmarks.common.workspace import temporary_folder
from dlo_export.checkpoints.adapter.adapter import DloAdapter, load_adapter, save_adapter
from dlo_export.checkpoints.depth.expansion import expanded_config, expanded_tensors, expansion_adapter
from dlo_export.checkpoints.depth.placements import ExpansionPlan, placements
from dlo_export.checkpoints.errors import DloError
from dlo_export.checkpoints.llama_layer import HEAD
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.artefact_runner import exposed_model, open_artefact
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.parity_references import graph_as_it_was
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph, read_prepared
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.exporter.weight_file import external_tensors, take_weights
from dlo_export.graph_passes.find.padding import takes_left_padding
from dlo_export.runtimes.artefact.description import MODEL_NAME
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.parity.cases import Case, step_feeds
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.torch.runner import TorchRunner

UNTOUCHED, ZERO_OUT, MASKED, SKIPPING = "untouched", "zero_out layers", "masked", ("compact", "if")
PYTORCH: Final = {"PyTorch in float32": torch.float32, "PyTorch in float16": torch.float16}
EXACT: Final = "PyTorch in float64"
# Of the logits: largest difference to the untouched graph by dtype, and to the graph's own masked form as a share of
# the token's largest logit.
INJECTED_BARS: Final = {"fp32": 1e-5, "fp16": 1e-3, "int4": 1e-3}
MASKED_BAR: Final = 1e-4
OWN_ROUNDING: Final = 2.0  # times what the untouched graph is off
ROUNDS: Final = 4  # the accuracy level of activations in 8 bits
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
    "both, activations not in 8 bits",
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
class OwnRounding:
    """What is off in the untouched graph.

    Attributes:
        of_peak: See `Difference`, from PyTorch in float64; or PyTorch's in the graph's numbers, if that is more.
        flips: Decisions of listening routers that are not PyTorch's.
    """

    of_peak: float
    flips: int


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
        from_pytorch: How far the logits are from the PyTorch model's in float64, under its decisions.
        flips: Decisions that are not the PyTorch model's.
        decisions: Of how many.
        exactly: How far the logits are where the graph's nodes leave activations as they are, if they do not.
        exact_flips: Its decisions that are not the PyTorch model's.
        own: What the untouched graph is off; None in rows that are compared with nothing but PyTorch.
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
    exactly: Difference | None = None
    exact_flips: int | None = None
    own: OwnRounding | None = None
    refused: str = ""

    @property
    def verdict(self) -> str:
        """One word or two, or the reason; none for what others are measured by."""
        if self.refused or self.own is None:
            return self.refused
        # Not "above the bar": what is no number misses it too.
        held = self.held is None or self.bar is None or self.held <= self.bar
        if held and not self.flips:
            return "pass"
        near = self.from_pytorch is not None and self.from_pytorch.of_peak <= OWN_ROUNDING * self.own.of_peak
        as_often = (self.flips or 0) <= OWN_ROUNDING * self.own.flips
        by_activations = self.exactly is not None and self.exactly.of_peak <= MASKED_BAR and not self.exact_flips
        return "own rounding" if (near and as_often) or by_activations else "missed"

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
        exactly = "" if self.exactly is None else f"{self.exactly.of_peak:.1e}, {self.exact_flips}"
        return [self.source, self.dtype, self.form, self.compared_with, *numbers, flips, exactly, self.verdict]


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


def outcomes(runner: Runner, cases: list[Case], forced: Sequence[np.ndarray] | None = None) -> list[Outcome]:
    """What a model computes for each text.

    Args:
        runner: Runs it.
        cases: The texts.
        forced: By text, decisions in place of its routers': bool, [routed layers, real tokens].
    """
    found = []
    for text, case in enumerate(cases):
        runner.reset(case.batch)
        layers, shape = runner.routed_layers, case.real.shape
        decisions = None if forced is None else _by_step(case, layers, forced[text])
        results = []
        for number, feed in enumerate(case.feeds):
            active = None if decisions is None else decisions[number]
            results.append(runner.step(feed.input_ids, feed.attention_mask, feed.position_ids, force_active=active))
        logits = np.concatenate([result.logits for result in results], axis=1)
        scores = [np.concatenate([result.router_scores[layer] for result in results], axis=1) for layer in layers]
        stacked = np.stack(scores) if scores else np.zeros((0, *shape), np.float32)
        found.append(Outcome(logits[case.real], stacked[:, case.real] > 0.5))
    return found


def _by_step(case: Case, layers: Sequence[int], decided: np.ndarray) -> list[dict[int, np.ndarray]]:
    """Decisions for real tokens as a runner takes them: per step, by layer, [batch, sequence]."""
    whole = np.ones((len(layers), *case.real.shape), np.bool_)
    whole[:, case.real] = decided
    ends = np.cumsum([feed.input_ids.shape[1] for feed in case.feeds])[:-1]
    return [dict(zip(layers, part, strict=True)) for part in np.split(whole, ends, axis=2)]


def all_active(outcome: list[Outcome]) -> list[np.ndarray]:
    """Decisions by which nothing is skipped, shaped as others'."""
    return [np.ones_like(each.decisions) for each in outcome]


class PyTorchModel:
    """The PyTorch model that has the graph's own weights, deepened and routed by the adapter.

    Args:
        graph: The untouched one.
        adapter: Of layers and routers.
        plan: Of the layers.
    """

    def __init__(self, graph: Path, adapter: DloAdapter, plan: ExpansionPlan) -> None:
        tensors = open_foreign_graph(graph).tensors
        # A head and an embedding that are quantised apart are tied no more.
        config = json.loads((graph.parent / "config.json").read_text()) | {"tie_word_embeddings": HEAD not in tensors}
        self._adapter, self._config = adapter, config | expanded_config(config, plan)
        self._tensors = expanded_tensors(tensors, plan)

    @contextlib.contextmanager
    def runner(self, dtype: torch.dtype) -> Iterator[TorchRunner]:
        """Runs it in a type of numbers."""
        model = routable_model(self._config, self._tensors, dtype=dtype)
        for layer in self._adapter.routed_layers:
            router = model.model.router(layer)
            assert router is not None
            router.weight.data.copy_(router.weight.new_tensor(self._adapter.router(layer)))
        with TorchRunner(model) as reference:
            yield reference


def masked_form(graph: Path, adapter: Path, artefact: Path, lowering: str) -> ir.Model:
    """An artefact before its lowering, on its own weights, norms fused as its are."""
    with contextlib.closing(open_source(str(graph), adapter)) as source:
        dtype = graph_dtype(source.base.graph_dtype("auto"))
        model = build_model(source, "masked", dtype, compared_with=lowering)
        different = take_weights(model, external_tensors(ir.load(artefact / MODEL_NAME).graph))
        assert not different, f"{sorted(different)[:5]} are not the artefact's"
    return model


def leave_activations(model: ir.Model) -> bool:
    """Has a graph multiply activations as they are by its weights' codes, not rounded to 8 bits; whether it did."""
    rounding = [node for node in model.graph.all_nodes() if node.attributes.get_int("accuracy_level", 0) == ROUNDS]
    for node in rounding:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return bool(rounding)


def graph_outcomes(
    model: ir.Model,
    artefact: Path,
    cases: list[Case],
    forced: Sequence[np.ndarray] | None = None,
) -> list[Outcome]:
    """What a graph computes on an artefact's weights, its routers shown; see `outcomes`."""
    shown = exposed_model(model, force=forced is not None)
    with OnnxRuntimeRunner(shown, weights_folder=artefact, allow_spinning=False) as runner:
        return outcomes(runner, cases, forced)


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
        padded = takes_left_padding(read_prepared(graph).model.graph)
        cases = text_cases(tokens, padded=padded)
        with (
            contextlib.closing(open_source(str(graph), folder / "layers")) as opened,
            graph_as_it_was(opened) as runner,
        ):
            untouched = outcomes(runner, cases)
        pytorch = PyTorchModel(graph, load_adapter(folder / "routers"), plan)
        with pytorch.runner(torch.float64) as runner:
            exact = outcomes(runner, cases)
            exact_dense = outcomes(runner, cases, all_active(exact))
        rounded = {}
        for form, dtype in PYTORCH.items() if source.dtype == "fp16" else [next(iter(PYTORCH.items()))]:
            with pytorch.runner(dtype) as runner:
                rounded[form] = outcomes(runner, cases)
    except DloError as err:
        yield dataclasses.replace(blank, refused=err.message)
        return
    for form, found in rounded.items():
        apart = Difference.between(found, exact)
        yield dataclasses.replace(blank, form=form, compared_with=EXACT, difference=apart, **_decided(found, exact))
    in_pytorch = max(Difference.between(found, exact).of_peak for found in rounded.values())
    artefact = folder / "artefact"
    export(graph, artefact, folder / "routers", MASKED)
    listening = graph_outcomes(load_graph(artefact / MODEL_NAME), artefact, cases, all_active(exact))
    apart, decided = Difference.between(listening, exact_dense), _decided(listening, exact_dense)
    yield dataclasses.replace(blank, from_pytorch=apart, **decided)
    blank = dataclasses.replace(blank, own=OwnRounding(max(apart.of_peak, in_pytorch), decided["flips"]))
    try:
        export(graph, artefact, folder / "layers")
        with open_artefact(artefact, allow_spinning=False) as runner:
            found = outcomes(runner, cases)
        apart, bar = Difference.between(found, untouched), INJECTED_BARS[source.dtype]
        row = dataclasses.replace(blank, form=ZERO_OUT, compared_with=UNTOUCHED, difference=apart, bar=bar)
        yield dataclasses.replace(row, held=apart.largest, from_pytorch=Difference.between(found, exact_dense))
    except DloError as err:
        yield dataclasses.replace(blank, form=ZERO_OUT, refused=err.message)
    for form in (MASKED, *SKIPPING):
        row = dataclasses.replace(blank, form=form)
        try:
            yield _routed_row(row, graph, folder, cases, exact)
        except DloError as err:
            yield dataclasses.replace(row, refused=err.message)


def _routed_row(row: Row, graph: Path, folder: Path, cases: list[Case], exact: list[Outcome]) -> Row:
    """A routed form: against its masked form, and against PyTorch."""
    artefact, routers = folder / "artefact", folder / "routers"
    export(graph, artefact, routers, row.form)
    with open_artefact(artefact, allow_spinning=False) as runner:
        found = outcomes(runner, cases)
    released = load_graph(artefact / MODEL_NAME)
    if row.form in SKIPPING:
        masked = graph_outcomes(masked_form(graph, routers, artefact, row.form), artefact, cases)
        apart = Difference.between(found, masked)
        row = dataclasses.replace(
            row, compared_with="its masked form", difference=apart, bar=MASKED_BAR, held=apart.of_peak
        )
    decided = _decided(found, exact)
    if decided["flips"]:  # the logits that follow a decision are another matter
        found = graph_outcomes(released, artefact, cases, [each.decisions for each in exact])
    row = dataclasses.replace(row, from_pytorch=Difference.between(found, exact), **decided)
    if leave_activations(released):
        found = graph_outcomes(released, artefact, cases)
        flips = _decided(found, exact)["flips"]
        row = dataclasses.replace(row, exactly=Difference.between(found, exact), exact_flips=flips)
    return row


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
    with temporary_folder() as folder:
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
