"""Configurations of routed models, in Hugging Face form and with the DLO authors' keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import (
    KV_KEY,
    LLAMA,
    MODEL_TYPES,
    Family,
    ModelType,
    RoutingKind,
    kv_problem,
    routed_type,
    routing_kind,
)
from dlo_export.checkpoints.router_thresholds import ONE_HALF, read_thresholds, threshold_problems


class RoutingConfigError(InputError):
    """A configuration's routing keys contradict each other or leave something open."""


class LlamaDloConfig(LlamaConfig):
    """A Llama of whose routed layers each token may skip the MLP (DLO, arXiv 2407.11030).

    A token is active in routed layer l iff ``sigmoid(router_l · x) > t_l``, x being the layer's input; an active
    token's MLP branch is multiplied by ``0.5·scale_factor + (score - 0.5)·scale_gap`` if `rescale_hidden_states`.

    Args:
        is_dlo: Per layer, whether it is routed; one bool for all of them. None (as a plain Llama has): no layer.
        rescale_hidden_states: See above.
        scale_factor: See above. No default: the authors' code has four that disagree.
        scale_gap: See above.
        router_thresholds: By layer, in decimal, t_l; one half where it is left out. A model with any is saved as a
            `LlamaDloThresholdsConfig`: readers of the authors' type would take one half for all of them.
        dlo_capacity: Share of tokens that training keeps active; inference ignores it.
        dlo_loss_type: How training labels tokens, for example ``cos-global``.
        dlo_loss_coefficient: Weight of the skip loss in training.
        gate_init_method: How training initialised the routers.
        injected_layers: The layers that were added to a trained model, as dicts of position, source and init.
    """

    model_type = routed_type("mlp").name
    # Of the class and not of config.json: there model_type says it.
    routing: ClassVar[RoutingKind] = "mlp"
    family: ClassVar[Family] = LLAMA

    is_dlo: list[bool] | bool | None = None
    rescale_hidden_states: bool = False
    scale_factor: float | int | None = None
    scale_gap: float | int | None = None
    router_thresholds: dict[str, float] | None = None
    dlo_capacity: float | int | list[float] | None = None
    dlo_loss_type: str | None = None
    dlo_loss_coefficient: float | int | None = None
    gate_init_method: str = "zero"
    injected_layers: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Expands `is_dlo` to a list and checks the routing keys.

        Raises:
            RoutingConfigError: `is_dlo` has another length than the model, the scale is not given, or a threshold is no
                score or a layer's that is not routed.
        """
        super().__post_init__(**kwargs)
        # Training switches the cache off and its checkpoints keep the switch; inference needs it on.
        self.use_cache = True
        if not isinstance(self.is_dlo, list):
            self.is_dlo = [bool(self.is_dlo)] * self.num_hidden_layers
        self._check_routing()

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of the routed layers."""
        assert isinstance(self.is_dlo, list)
        return tuple(layer for layer, routed in enumerate(self.is_dlo) if routed)

    @property
    def branch_scale(self) -> tuple[float, float]:
        """(a, b): an active token's skippable branch (of two, the MLP) times a + b·score; (1, 0) without rescaling."""
        if not self.rescale_hidden_states or self.scale_factor is None or self.scale_gap is None:
            return 1.0, 0.0
        return 0.5 * self.scale_factor - 0.5 * self.scale_gap, float(self.scale_gap)

    @property
    def thresholds(self) -> dict[int, float]:
        """By routed layer, where it is not one half."""
        return read_thresholds(self.router_thresholds)

    def threshold(self, layer: int) -> float:
        """What a layer's score must exceed."""
        return self.thresholds.get(layer, ONE_HALF)

    def _check_routing(self) -> None:
        if problems := self._routing_problems():
            raise RoutingConfigError(
                f"{self.model_type} configuration: {'; '.join(problems)}",
                hint="take the values the model was trained with",
            )

    def _routing_problems(self) -> list[str]:
        assert isinstance(self.is_dlo, list)
        problems = []
        if len(self.is_dlo) != self.num_hidden_layers:
            problems.append(
                f"is_dlo has {len(self.is_dlo)} entries, expected num_hidden_layers ({self.num_hidden_layers})"
            )
        if self.rescale_hidden_states:
            problems += [
                f"{key} is missing, expected a number because rescale_hidden_states is true"
                for key in ("scale_factor", "scale_gap")
                if getattr(self, key) is None
            ]
        return problems + threshold_problems(self.router_thresholds, self.routed_layers)


class LlamaDloThresholdsConfig(LlamaDloConfig):
    """The same, of a model whose routers have thresholds of their own."""

    model_type = routed_type("mlp", thresholds=True).name


class LlamaDloLayerConfig(LlamaDloConfig):
    """A Llama whose routed layers each token may skip whole, attention and its cache included."""

    model_type = routed_type("layer").name
    routing: ClassVar[RoutingKind] = "layer"


class LlamaDloLayerThresholdsConfig(LlamaDloLayerConfig):
    """The same, of a model whose routers have thresholds of their own."""

    model_type = routed_type("layer", thresholds=True).name


class LlamaDloAttentionConfig(LlamaDloConfig):
    """A Llama of whose routed layers each token may skip attention, with or without thresholds.

    Args:
        attention_routing_kv: Whose keys and values a routed layer's cache holds: "all" tokens', as in Router-Tuning
            (arXiv 2410.13184), or those of "active" ones, which then attend to each other only.
    """

    model_type = routed_type("attention").name

    attention_routing_kv: str = "all"

    @property
    def routing(self) -> RoutingKind:  # type: ignore[override]  # the type of model leaves it open
        """What a token skips."""
        kind = routing_kind(self._routing_values)
        assert kind is not None, "a routed type"
        return kind

    @property
    def _routing_values(self) -> dict[str, Any]:
        return {"model_type": self.model_type, KV_KEY: self.attention_routing_kv}

    def _routing_problems(self) -> list[str]:
        problem = kv_problem(self._routing_values)
        return [*super()._routing_problems(), *([] if problem is None else [f"{KV_KEY} {problem}"])]


_FAMILIES: Mapping[str, type[PreTrainedConfig]] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
    "granite": GraniteConfig,
    "olmo2": Olmo2Config,
}
_LLAMAS = {
    config_class.model_type: config_class
    for config_class in (
        LlamaDloConfig,
        LlamaDloThresholdsConfig,
        LlamaDloLayerConfig,
        LlamaDloLayerThresholdsConfig,
        LlamaDloAttentionConfig,
    )
}


def _family_config(kind: ModelType) -> type[LlamaDloConfig]:
    """The same keys of routing on top of another family's own configuration, whose fields it has besides a Llama's."""
    assert kind.routing is not None, "asked for routed types"
    assert kind.architecture is not None, "asked for routed types"
    llama = _LLAMAS[routed_type(kind.routing, thresholds=kind.thresholds).name]
    body = {
        "__doc__": f"A {kind.family.prefix} routed as by a `{llama.__name__}`. Its config.json leaves out no field.",
        "__module__": __name__,
        "model_type": kind.name,
        "family": kind.family,
    }
    name = kind.architecture.removesuffix("ForCausalLM") + "Config"
    return type(name, (llama, _FAMILIES[kind.family.name]), body)


CONFIGURATIONS: Mapping[str, type[LlamaDloConfig]] = _LLAMAS | {
    kind.name: _family_config(kind)
    for kind in MODEL_TYPES.values()
    if kind.routing is not None and kind.family is not LLAMA
}
"""By model type."""
globals().update({config_class.__name__: config_class for config_class in CONFIGURATIONS.values()})

# Here rather than beside the models: a tokenizer needs to know the configuration's type, and no PyTorch.
for model_type, configuration in CONFIGURATIONS.items():
    AutoConfig.register(model_type, configuration, exist_ok=True)
