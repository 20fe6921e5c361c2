"""What every pass of this package keeps: it runs in its order, and once; a model remembers what has run on it."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.naming import make_value_names_unique

PASSES_KEY = "dlo.passes"
"""Entry of a model's metadata: the passes that changed it, in order."""

Border = Literal["plain", "injected", "routed"]
"""Of the pipeline's stages, in order; what a lowering does comes behind the last one (`spec/invariants.py`)."""


@dataclasses.dataclass(frozen=True)
class PassRun:
    """A pass that changed a model.

    Attributes:
        name: Of its class.
        settings: Its `GraphPass.settings`.
        runs_after: Names of the classes it says it runs after. They are kept with the model, so that the order holds
            for whoever loads it, whatever passes he knows.
    """

    name: str
    settings: dict[str, Any]
    runs_after: tuple[str, ...]


def passes_run(model: ir.Model) -> tuple[PassRun, ...]:
    """Passes that changed the model, in order; also those before it was last saved.

    Raises:
        GraphPassError: The model's metadata are no such list.
    """
    try:
        entries = json.loads(model.metadata_props.get(PASSES_KEY, "[]"))
        return tuple(PassRun(entry["name"], entry["settings"], tuple(entry["runs_after"])) for entry in entries)
    except (ValueError, TypeError, KeyError) as err:
        raise GraphPassError(
            f"metadata '{PASSES_KEY}' does not list the passes that changed the model: {err!r}",
            hint="take the metadata out of the graph, or export it again",
        ) from err


def forget_run(model: ir.Model, name: str) -> None:
    """Takes a pass out of the list: what it did was undone, and it may run again.

    Args:
        model: Its metadata are changed.
        name: Of the pass's class.
    """
    entries = [dataclasses.asdict(entry) for entry in passes_run(model) if entry.name != name]
    model.metadata_props[PASSES_KEY] = json.dumps(entries)


class GraphPass(ir.passes.InPlacePass, abc.ABC):
    """Base of the passes: a frozen dataclass whose fields are its settings.

    onnx_ir calls `requires`, `call`, `ensures`. A pass here writes `check` (what it needs of the graph), `rewrite`
    (what it does) and, where it promises something that no stage checks, `ensures`. Running it again on the same model
    changes nothing, and is refused with other settings.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = ()
    """Passes (or bases of passes) that do not fit behind this one; they need not run at all."""
    nodes_from: ClassVar[Border | None] = None
    """The first border at which its nodes may stand in a graph; None: at none, unless the stage names the pass."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what the pass does, in JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def requires(self, model: ir.Model) -> None:
        """The model may be changed by this pass.

        Raises:
            GraphPassError: A pass that runs after this one has run, this one has run with other settings, or the graph
                is not what `check` asks for.
        """
        if self._has_run(model):
            return
        # A pass behind this one may have named it, or a base of it such as all lowerings have.
        own = {cls.__name__ for cls in type(self).__mro__}
        later = [run.name for run in passes_run(model) if own.intersection(run.runs_after)]
        if later:
            raise GraphPassError(
                f"{self._name}: {', '.join(later)} ran before, expected after it.",
                hint="run the passes in the order of the pipeline, on a graph that none of them has changed",
            )
        self.check(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model, unless this pass has done so before."""
        if self._has_run(model):
            return ir.passes.PassResult(model, modified=False)
        modified = self.rewrite(model)
        # What changed nothing has not run: it may still be asked for once the graph has changed.
        if modified:
            # New nodes are named after what they are for; a graph from outside may have given such a name before.
            make_value_names_unique(model.graph)
            run = PassRun(self._name, self.settings, tuple(sorted(_predecessors(type(self)))))
            entries = [dataclasses.asdict(entry) for entry in (*passes_run(model), run)]
            model.metadata_props[PASSES_KEY] = json.dumps(entries)
        return ir.passes.PassResult(model, modified=modified)

    def check(self, model: ir.Model) -> None:
        """What the pass needs of the graph; by default nothing.

        Raises:
            GraphPassError: With all reasons.
        """
        del model

    @abc.abstractmethod
    def rewrite(self, model: ir.Model) -> bool:
        """Change the model; say whether anything changed."""

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _has_run(self, model: ir.Model) -> bool:
        """Whether this pass changed the model before.

        Raises:
            GraphPassError: It did, with other settings.
        """
        for run in passes_run(model):
            if run.name != self._name:
                continue
            wanted = json.loads(json.dumps(self.settings))
            if run.settings != wanted:
                raise GraphPassError(
                    f"{self._name}: ran on this graph before, with {run.settings}, expected the same and not {wanted}.",
                    hint="start again from the graph before that pass",
                )
            return True
        return False


def makers_at(border: Border) -> frozenset[str]:
    """Names of the passes whose nodes may stand in a graph at a border, as far as they are imported."""
    borders = get_args(Border)
    passed = borders[: borders.index(border) + 1]
    makers: set[str] = set()
    waiting: list[type[GraphPass]] = GraphPass.__subclasses__()
    while waiting:
        pass_ = waiting.pop()
        waiting += pass_.__subclasses__()
        if pass_.nodes_from in passed:
            makers.add(pass_.__name__)
    return frozenset(makers)


def _predecessors(pass_: type[GraphPass]) -> set[str]:
    """Names of the passes that do not fit behind one, directly or because of those it runs after."""
    names: set[str] = set()
    for earlier in pass_.runs_after:
        names |= {earlier.__name__} | _predecessors(earlier)
    return names


def check_order(passes: Sequence[ir.passes.PassBase]) -> None:
    """Check that no pass precedes one that its class says it runs after, before any of them runs.

    Raises:
        GraphPassError: With all violations.
    """
    problems = []
    for position, pass_ in enumerate(passes):
        earlier = tuple(getattr(type(pass_), "runs_after", ()))
        problems += [
            f"{type(pass_).__name__} stands at {position}, before {type(later).__name__} at {late}"
            for late, later in enumerate(passes[position + 1 :], position + 1)
            if isinstance(later, earlier)
        ]
    if problems:
        raise GraphPassError(
            "check_order: " + "; ".join(problems) + "; expected each after the passes its runs_after names.",
            hint="reorder the pipeline's list",
        )
