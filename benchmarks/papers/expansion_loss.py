"""(a) What each way to enlarge a model costs before anything is learned."""

from __future__ import annotations

from benchmarks.papers.budget import Piece
from benchmarks.papers.experiment import Experiment
from benchmarks.papers.subjects import MakeModel, deeper, expansions, mixtures
from dlo_export.checkpoints.depth.expansion import ExpansionPlan
from dlo_export.checkpoints.depth.layer_init import preserves_function

PREFIX = "expanded-"
BASE = "expanded-original"


def expansion_pieces(experiment: Experiment) -> list[Piece]:
    """The model as it is, which comes first, deepened by every method, and widened."""
    layers = experiment.base.layers

    def deepened(plan: ExpansionPlan) -> MakeModel:
        return lambda base: base.expanded(plan)

    plans = expansions(layers, experiment.form.tli_every)
    makers: dict[str, tuple[MakeModel, int, bool]] = {"original": (lambda base: base.model(), layers, True)}
    for name, plan in plans.items():
        preserved = all(preserves_function(layer.init) for layer in plan.injected_layers)
        makers[name] = (deepened(plan), plan.num_layers, preserved)
    for name, make in mixtures().items():
        makers[name] = (make, layers, "not renormalised" not in name)

    def piece(name: str, make: MakeModel, depth: int, preserved: bool) -> Piece:
        def measure() -> dict[str, object]:
            model = make(experiment.base)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            description = {"layers": depth, "parameters": parameters, "keeps_the_function": preserved}
            return {"method": name, **description, **experiment.measured(model)}

        def seconds() -> float:
            if name == "original":
                return 0.0  # nothing is known of this machine yet: the first measurement is made in any case
            return 2.0 * pass_seconds(experiment) * depth / deeper(layers)

        return Piece(f"{PREFIX}{_file_name(name)}", seconds, measure, () if name == "original" else (BASE,))

    return [piece(name, *maker) for name, maker in makers.items()]


def pass_seconds(experiment: Experiment) -> float:
    """What it took to run the original over all held-out text."""
    return float(experiment.results[BASE]["seconds"])


def _file_name(method: str) -> str:
    return method.replace(",", "").replace(" ", "-")
