"""Model types, and the families they are of: what their config.json means where it differs from a Llama's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_fields import JsonFields
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, OLMO2_LAYER, Block, LayerModule, LayerTable

FULL_ATTENTION = "full_attention"

WindowRule = Literal["sliding_window", "layer_types", "use_sliding_window", "max_window_layers"]

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
class Family:
    """Decoders of one arithmetic: Llama's, and where it differs.

    Attributes:
        name: The `model_type` of its plain models.
        prefix: Of the names of its PyTorch classes, "Qwen2" of Qwen2ForCausalLM.
        layer: What its layers consist of.
        qkv_bias: Whether q, k and v have biases, and o has none, whatever config.json says.
        qk_norm: Whether queries and keys are normalised before they are rotated; `layer` says over what.
        skips_rope: Whether config.json names layers that do not rotate them (`no_rope_layers`).
        has_multipliers: Whether config.json has factors of embeddings, attention scores, branches and logits.
        gguf_rows: How GGUF files of this architecture order the rows of q and k: "paired", neighbours are rotated
            together, or "halved", as in a checkpoint. None where such files are not read.
    """

    name: str
    prefix: str
    layer: LayerTable = LLAMA_LAYER
    qkv_bias: bool = False
    qk_norm: bool = False
    skips_rope: bool = False
    has_multipliers: bool = False
    gguf_rows: Literal["paired", "halved"] | None = None


LLAMA = Family("llama", "Llama", gguf_rows="paired")


@dataclass(frozen=True)
class ModelType:
    """How one `model_type` of config.json is read.

    Attributes:
        name: Of the type.
        family: Whose arithmetic it has.
        routing: What the routed layers of a routed type skip, "attention" whatever is left in the cache; None for a
            plain decoder.
        architecture: Of the routed types: our PyTorch class for it, which config.json names.
        window: The field that puts a sliding window in force: a `sliding_window` that is not null; a `layer_types` that
            is not full attention for every layer; a `sliding_window` unless `use_sliding_window` is false; both, and
            layers from `max_window_layers` on. A window as long as the context never hides anything.
        thresholds: Whether its routers may have thresholds of their own (`router_thresholds`). The authors' types have
            none, and readers that know them would not look for any: the types of models that have are others.
        defaults: Of fields that are left out, where they differ from Llama's.
        unread: Fields of a Llama that this type's code does not read, whatever they say.
    """

    name: str
    family: Family = LLAMA
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
        context = fields.values.get("max_position_embeddings")
        if type(window) is int and type(context) is int and window >= context:
            return
        if self.window in ("layer_types", "max_window_layers") and layer_types is not None:
            if layer_types != [FULL_ATTENTION] * num_layers:
                fields.problem("layer_types", f"is {layer_types!r}, expected {FULL_ATTENTION!r} for every layer")
        elif window is not None and self._uses_window(fields.values, num_layers):
            default = (
                f", as {self.name} takes it to be unless it is null"
                if window == self.defaults.get("sliding_window")
                else ""
            )
            fields.problem("sliding_window", f"is {window!r}{default}, expected full attention")

    def _uses_window(self, values: Mapping[str, Any], num_layers: int) -> bool:
        """Whether a window that is given is in force in any layer."""
        switch = values.get("use_sliding_window")
        if self.window == "max_window_layers":
            first = values.get("max_window_layers")
            return bool(switch) and not (type(first) is int and first >= num_layers)
        return not (self.window == "use_sliding_window" and switch is False)

    def written(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same model's config.json for readers that know nothing of this type's defaults.

        Args:
            values: As `read` gave them, no window in force.

        Returns:
            A Llama's, where the type has Llama's arithmetic and another name; the values themselves for Llama and what
            the DLO authors made of it.
        """
        if not self.defaults:
            return dict(values)
        kept = {name: value for name, value in values.items() if name not in _WINDOW_FIELDS}
        if self.family is not LLAMA:
            return kept | {"use_sliding_window": False}
        return kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


_WINDOW_FIELDS = ("sliding_window", "layer_types", "max_window_layers", "use_sliding_window")

_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
# Neither class has biases, nor a switch for its window.
_NO_BIASES = ("attention_bias", "mlp_bias", "use_sliding_window")

_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SMOLLM3 = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "pad_token_id": 128_004,
}
_OLMO2 = {"rms_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50_279}
_GRANITE = dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0)

# Of a Llama's type and the routed ones. The DLO authors' code; `llama_dlo_exattn` keeps attention dense.
_LLAMAS = (
    ModelType("llama"),
    ModelType("llama_dlo", routing="layer", architecture="LlamaDloLayerForCausalLM"),
    ModelType("llama_dlo_exattn", routing="mlp", architecture="LlamaDloForCausalLM"),
    # Ours: attention alone is skipped, after Router-Tuning (arXiv 2410.13184). Every reader of it knows thresholds.
    ModelType("llama_dlo_attn", routing="attention", architecture="LlamaDloAttentionForCausalLM", thresholds=True),
    # Ours: the authors' with thresholds, refused by readers that would take one half for all of them.
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
# Plain types of other names and other families.
_OTHERS = (
    ModelType("mistral", window="sliding_window", defaults=_MISTRAL, unread=_NO_BIASES),
    ModelType("ministral", window="layer_types", defaults=_MISTRAL, unread=_NO_BIASES),
    ModelType(
        "qwen2",
        Family("qwen2", "Qwen2", qkv_bias=True, gguf_rows="halved"),
        window="max_window_layers",
        defaults=_QWEN,
        unread=("attention_bias", "mlp_bias"),
    ),
    ModelType(
        "qwen3",
        Family("qwen3", "Qwen3", qk_norm=True, gguf_rows="halved"),
        window="max_window_layers",
        defaults=_QWEN | {"head_dim": 128},
        unread=("mlp_bias",),
    ),
    ModelType("smollm3", Family("smollm3", "SmolLM3", skips_rope=True), window="max_window_layers", defaults=_SMOLLM3),
    ModelType("granite", Family("granite", "Granite", has_multipliers=True), defaults=_GRANITE),
    ModelType("olmo2", Family("olmo2", "Olmo2", OLMO2_LAYER, qk_norm=True), defaults=_OLMO2, unread=("mlp_bias",)),
)


def _routed_types(plain: ModelType) -> Iterator[ModelType]:
    """Of a family: every routed type that Llama has, under a name that readers of Llama's do not know."""
    for kind in _LLAMAS:
        if kind.architecture is not None:
            name = plain.family.name + kind.name.removeprefix(LLAMA.name)
            architecture = plain.family.prefix + kind.architecture.removeprefix(LLAMA.prefix)
            yield replace(plain, name=name, routing=kind.routing, architecture=architecture, thresholds=kind.thresholds)


# Each of the plain ones is compared with transformers' own class in tests/checkpoints/test_model_types.py.
MODEL_TYPES: Mapping[str, ModelType] = {
    kind.name: kind
    for kind in (
        *_LLAMAS,
        *_OTHERS,
        *(routed for plain in _OTHERS if plain.family is not LLAMA for routed in _routed_types(plain)),
    )
}
GGUF_FAMILIES: Mapping[str, Family] = {
    kind.name: kind.family
    for kind in MODEL_TYPES.values()
    if kind.name == kind.family.name and kind.family.gguf_rows is not None
}
"""By what GGUF files call the architecture."""
PLAIN_TYPES: tuple[str, ...] = tuple(name for name, kind in MODEL_TYPES.items() if kind.routing is None)
"""Names of those without routers."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json that is supported; of what has no config.json, Llama's."""
    return MODEL_TYPES[config.get("model_type", LLAMA.name)].family


def routed_type(routing: RoutingKind, *, thresholds: bool = False, family: Family = LLAMA) -> ModelType:
    """The model type whose routed layers skip this: the plainest that can say so.

    Args:
        routing: What they skip.
        thresholds: Whether any router has a threshold of its own.
        family: Of the model.
    """
    skipped = "attention" if routing == "attention-active" else routing
    able = (kind for kind in MODEL_TYPES.values() if kind.routing == skipped and kind.family == family)
    return next(kind for kind in able if kind.thresholds >= thresholds)


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
