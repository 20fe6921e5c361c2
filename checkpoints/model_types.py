"""Model types whose arithmetic is Llama's: what their config.json means where it differs from a Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_fields import JsonFields
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, Block, LayerModule

FULL_ATTENTION = "full_attention"

WindowRule = Literal["sliding_window", "layer_types", "use_sliding_window"]

RoutingKind = Literal["mlp", "layer", "attention", "attention-active"]
"""What a token skips in a routed layer: the MLP, the whole layer, or attention. With "attention" it leaves its keys and
values all the same, so that the others attend to everybody; with "attention-active" it leaves none."""

ROUTED_BLOCKS: Mapping[RoutingKind, tuple[Block, ...]] = {
    "mlp": ("mlp",),
    "layer": ("self_attn", "mlp"),
    "attention": ("self_attn",),
    "attention-active": ("self_attn",),
}
"""The residual blocks that a skipped token skips; the last one's branch is what the rule scales."""

KV_KEY = "attention_routing_kv"
"""Of config.json: whose keys and values a layer's cache holds where tokens skip attention, "all" or "active"."""

_KV_CHOICES: Mapping[str, RoutingKind] = {"all": "attention", "active": "attention-active"}


@dataclass(frozen=True)
class ModelType:
    """How one `model_type` of config.json is read.

    Attributes:
        name: Of the type.
        routing: What the routed layers of a routed type skip, "attention" whatever is left in the cache; None for a
            plain decoder.
        architecture: Of the routed types: our PyTorch class for it, which config.json names.
        window: The field that puts a sliding window in force: a `sliding_window` that is not null; a `layer_types` that
            is not full attention for every layer; a `sliding_window` unless `use_sliding_window` is false.
        thresholds: Whether its routers may have thresholds of their own (`router_thresholds`). The authors' types have
            none, and readers that know them would not look for any: the types of models that have are others.
        defaults: Of fields that are left out, where they differ from Llama's.
        unread: Fields of a Llama that this type's code does not read, whatever they say.
    """

    name: str
    routing: RoutingKind | None = None
    architecture: str | None = None
    thresholds: bool = False
    window: WindowRule = "use_sliding_window"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json as this type's code reads it: its defaults filled in, what it ignores left out."""
        return {**self.defaults, **{name: value for name, value in values.items() if name not in self.unread}}

    def note_window(self, fields: JsonFields, num_layers: int) -> None:
        """Notes a sliding window that is in force as a problem.

        Args:
            fields: As `read` gave them.
            num_layers: As many entries as `layer_types` must have.
        """
        window, layer_types = fields.values.get("sliding_window"), fields.values.get("layer_types")
        if self.window == "layer_types" and layer_types is not None:
            if layer_types != [FULL_ATTENTION] * num_layers:
                fields.problem("layer_types", f"is {layer_types!r}, expected {FULL_ATTENTION!r} for every layer")
        elif window is not None and not (
            self.window == "use_sliding_window" and fields.values.get("use_sliding_window") is False
        ):
            default = (
                f", as {self.name} takes it to be unless it is null"
                if window == self.defaults.get("sliding_window")
                else ""
            )
            fields.problem("sliding_window", f"is {window!r}{default}, expected full attention")

    def as_llama(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same model's config.json as a Llama's, so that no reader needs to know the type.

        Args:
            values: As `read` gave them, no window in force.

        Returns:
            The values themselves for Llama and what the DLO authors made of it.
        """
        if not self.defaults:
            return dict(values)
        kept = {name: value for name, value in values.items() if name not in ("sliding_window", "layer_types")}
        return kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
# Neither class has biases, nor a switch for its window.
_NO_BIASES = ("attention_bias", "mlp_bias", "use_sliding_window")

# Each of these is compared with transformers' own class in tests/checkpoints/test_model_types.py.
MODEL_TYPES: Mapping[str, ModelType] = {
    kind.name: kind
    for kind in (
        ModelType("llama"),
        # The DLO authors' code; `llama_dlo_exattn` keeps attention dense.
        ModelType("llama_dlo", routing="layer", architecture="LlamaDloLayerForCausalLM"),
        ModelType("llama_dlo_exattn", routing="mlp", architecture="LlamaDloForCausalLM"),
        ModelType("mistral", window="sliding_window", defaults=_MISTRAL, unread=_NO_BIASES),
        ModelType("ministral", window="layer_types", defaults=_MISTRAL, unread=_NO_BIASES),
        # Ours: the authors' with thresholds, refused by readers that would take one half for all of them.
        # Ours: attention alone is skipped, after Router-Tuning (arXiv 2410.13184). Every reader of it knows thresholds.
        ModelType(
            "llama_dlo_attn",
            routing="attention",
            architecture="LlamaDloAttentionForCausalLM",
            thresholds=True,
        ),
        ModelType(
            "llama_dlo_thresholds",
            routing="layer",
            architecture="LlamaDloLayerThresholdsForCausalLM",
            thresholds=True,
        ),
        ModelType(
            "llama_dlo_exattn_thresholds",
            routing="mlp",
            architecture="LlamaDloThresholdsForCausalLM",
            thresholds=True,
        ),
    )
}


def routed_type(routing: RoutingKind, *, thresholds: bool = False) -> ModelType:
    """The model type whose routed layers skip this: the plainest that can say so.

    Args:
        routing: What they skip.
        thresholds: Whether any router has a threshold of its own.
    """
    skipped = "attention" if routing == "attention-active" else routing
    return next(kind for kind in MODEL_TYPES.values() if kind.routing == skipped and kind.thresholds >= thresholds)


def routing_kind(values: Mapping[str, Any]) -> RoutingKind | None:
    """What the routed layers of a model skip, by its config.json; None for a plain decoder.

    Args:
        values: With a `model_type` of MODEL_TYPES, a plain Llama's where there is none.
    """
    kind = MODEL_TYPES[values.get("model_type", "llama")].routing
    return _KV_CHOICES.get(values.get(KV_KEY) or "all") if kind == "attention" else kind


def kv_keys(routing: RoutingKind | None, before: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    """What config.json says of the cache besides the model type: nothing where the type says it all.

    Args:
        routing: What tokens skip; None for a plain decoder.
        before: The config.json that is changed: what it says and is to go becomes null, which is as good as left out.
    """
    choice = next((choice for choice, kind in _KV_CHOICES.items() if kind == routing), None)
    unsaid = choice is None and not (before is not None and before.get(KV_KEY))
    return {} if unsaid else {KV_KEY: choice}


def kv_problem(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a config.json's `attention_routing_kv`, from "is" on."""
    given = values.get(KV_KEY)
    if given is None:
        return None
    if MODEL_TYPES[values.get("model_type", "llama")].routing != "attention":
        return f"is {given!r}, but model_type {values.get('model_type')!r} skips no attention by itself"
    if not isinstance(given, str) or given not in _KV_CHOICES:
        return f"is {given!r}, expected {' or '.join(map(repr, _KV_CHOICES))}"
    return None


def leaves_keys(routing: RoutingKind) -> bool:
    """Whether tokens that skip a layer leave keys and values there; if not, a state must say who was active."""
    return routing in ("mlp", "attention")


def kept_projections(routing: RoutingKind) -> tuple[LayerModule, ...]:
    """Those of a skipped block that run for every token all the same: of keys and values that skipped ones leave."""
    keeps = leaves_keys(routing) and "self_attn" in ROUTED_BLOCKS[routing]
    return tuple(module for module in LLAMA_LAYER if keeps and module.axes[0] == "key-value")


def agreed_routing(own: RoutingKind | None, wanted: RoutingKind | None) -> RoutingKind:
    """What a model's routers skip once it gets more of them; MLPs where nothing says otherwise.

    Args:
        own: What those it has skip; None where it has none.
        wanted: What the new ones are to skip; None for the same.

    Raises:
        CheckpointError: The two differ.
    """
    if own is not None and wanted not in (None, own):
        raise CheckpointError(
            f"routing {wanted} was asked for, the model's routers are for routing {own}",
            hint="all routed layers of a model skip the same; `dlo calibrate` makes new routers, for any",
        )
    return own or wanted or "mlp"
