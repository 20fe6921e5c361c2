"""What a Llama checkpoint's config.json says, validated and reduced to what the exporter needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.adapter.checks import injected_layer_problems
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_fields import JsonFields
from dlo_export.checkpoints.files.json_file import read_json
from dlo_export.checkpoints.llama_layer import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MAX_LAYERS,
    Axis,
    LayerModule,
    layer_tensor_name,
    router_name,
)
from dlo_export.checkpoints.model_types import (
    KV_KEY,
    LLAMA,
    MODEL_TYPES,
    PLAIN_TYPES,
    Family,
    ModelType,
    RoutingKind,
    kv_keys,
    kv_problem,
    routed_type,
    routing_kind,
)
from dlo_export.checkpoints.rope import RopeConfig, rope_of_fields
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.checkpoints.router_thresholds import read_thresholds, threshold_problems, thresholds_json

__all__ = ["LlamaConfig", "Multipliers", "RopeConfig", "RoutingConfig"]

# In an artefact's config.json, model_type is "llama": what programs that read graphs know. What routes, and how, is a
# Llama only to them, so this key beside it keeps the model's own type, and readers of checkpoints go by it.
OWN_MODEL_TYPE = "dlo_model_type"

# Ways to compute the same attention, and outputs besides the logits: what config.json may say of them.
_ATTENTION_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass(frozen=True)
class RoutingConfig:
    """Which layers decide per token whether to run, and by what rule.

    A token is active in a routed layer iff sigmoid(router · layer input) exceeds the layer's threshold; an active
    token's MLP branch (attention's, where that alone is skipped) is multiplied by
    0.5·scale_factor + (score - 0.5)·scale_gap (DLO, arXiv 2407.11030).

    Attributes:
        kind: "mlp" skips the MLP branch, "layer" skips attention too, "attention" and "attention-active" that alone.
        layers: Indices of the routed layers, ascending.
        rescale: Whether the branch is multiplied at all.
        scale_factor: 2.0 where rescale is False: the multiplier is then 1.
        scale_gap: 0.0 where rescale is False.
        thresholds: By routed layer, where it is not 0.5; float32 numbers.
    """

    kind: RoutingKind
    layers: tuple[int, ...]
    rescale: bool
    scale_factor: float
    scale_gap: float
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def values(self, num_layers: int, family: Family = LLAMA) -> dict[str, Any]:
        """The keys of a config.json that say so, in the DLO authors' words as far as they have any."""
        return {
            "model_type": routed_type(self.kind, thresholds=bool(self.thresholds), family=family).name,
            "is_dlo": [layer in self.layers for layer in range(num_layers)],
            "rescale_hidden_states": self.rescale,
            "scale_factor": self.scale_factor,
            "scale_gap": self.scale_gap,
            **kv_keys(self.kind),
            **({THRESHOLDS: thresholds_json(self.thresholds)} if self.thresholds else {}),
        }


@dataclass(frozen=True)
class Multipliers:
    """Factors that Granite's models are computed with; a Llama's are neutral.

    Attributes:
        embedding: Of the embedded tokens.
        attention: Of the attention scores, in place of head_dim^-½; None for that.
        residual: Of what attention and MLP add to the residual stream.
        logits: Divisor of the logits.
    """

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0

    def values(self) -> dict[str, Any]:
        """The keys of a config.json that say so; none where the attention's factor is a Llama's."""
        if self.attention is None:
            return {}
        return {
            "embedding_multiplier": self.embedding,
            "attention_multiplier": self.attention,
            "residual_multiplier": self.residual,
            "logits_scaling": self.logits,
        }


@dataclass(frozen=True)
class LlamaConfig:
    """A supported configuration, of a Llama or of a family that differs from it in what is said here.

    Attributes:
        attention_bias: Whether o has a bias; where config.json says so, q, k and v have one too.
        qkv_bias: Whether q, k and v have biases.
        qk_norm: Whether queries and keys are normalised before they are rotated.
        layers_without_rope: Indices of layers that do not rotate them, ascending.
        initializer_range: Standard deviation of random weights.
        dtype: What config.json says the weights are ("float32", "bfloat16", …), None where it does not say.
        routing: None for a plain (or merely deepened) model.
        model_type: What config.json calls the model; more types than Llama have its arithmetic.
        family: Whose arithmetic it has.
        raw: config.json as read, its model_type the model's own; as a Llama's where the type has Llama's arithmetic.
            What the type's defaults say is spelt out.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    qkv_bias: bool
    qk_norm: bool
    layers_without_rope: tuple[int, ...]
    multipliers: Multipliers
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    initializer_range: float
    dtype: str | None
    routing: RoutingConfig | None
    model_type: str
    family: Family
    raw: dict[str, Any]

    @classmethod
    def from_json(cls, path: Path | str) -> LlamaConfig:
        """Reads a config.json.

        Raises:
            CheckpointError: The file is missing or not a JSON object, or names anything unsupported.
        """
        path = Path(path)
        return cls.from_dict(read_json(path, CheckpointError), origin=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "config.json") -> LlamaConfig:
        """Validates the values of a config.json. Keys left out mean what transformers' LlamaConfig takes them to.

        Args:
            values: The JSON object, with transformers 4's `rope_theta` and `rope_scaling` or 5's `rope_parameters`.
            origin: Where the values come from, for messages.

        Raises:
            CheckpointError: Lists every missing, malformed and unsupported field.
        """
        values = _own_values(values)
        model_type = values.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"{origin}: model_type is {model_type!r}, expected one of {', '.join(PLAIN_TYPES)}, or a routed one of "
                "these",
                hint="docs/checkpoints.md lists the families, and the names of their routed types",
            )
        kind = MODEL_TYPES[model_type]
        fields = JsonFields(kind.read(values))
        _reject_unsupported(fields)
        hidden_size = fields.integer("hidden_size")
        num_layers = fields.integer("num_hidden_layers", largest=MAX_LAYERS)
        if fields.are_valid("num_hidden_layers"):
            kind.note_window(fields, num_layers)
            fields.problems += _injected_layer_problems(fields.values.get("injected_layers"), num_layers)
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
        if fields.are_valid("num_attention_heads", "num_key_value_heads") and num_heads % num_kv_heads:
            fields.problem("num_attention_heads", f"is {num_heads}, expected a multiple of num_key_value_heads")
        max_position_embeddings = fields.integer("max_position_embeddings", default=2048)
        vocab_size = fields.integer("vocab_size")
        head_dim = _head_dim(fields, hidden_size, num_heads)
        attention_bias = fields.flag("attention_bias", default=False)
        without_rope = _layers_without_rope(fields, kind.family, num_layers)
        config = cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.positive_number("rms_norm_eps", default=1e-6),
            rope=rope_of_fields(fields, max_position_embeddings, head_dim),
            attention_bias=attention_bias,
            qkv_bias=attention_bias or kind.family.qkv_bias,
            qk_norm=kind.family.qk_norm,
            layers_without_rope=without_rope,
            multipliers=_multipliers(fields, kind.family),
            mlp_bias=fields.flag("mlp_bias", default=False),
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
            max_position_embeddings=max_position_embeddings,
            bos_token_id=fields.token("bos_token_id", default=1),
            eos_token_id=fields.tokens("eos_token_id", default=2),
            pad_token_id=_pad_token(fields, vocab_size),
            initializer_range=fields.number("initializer_range", default=0.02, least=0),
            dtype=_dtype(values),
            routing=_routing(fields, kind, num_layers),
            model_type=model_type,
            family=kind.family,
            raw=kind.written(fields.values) | _rope_layers(kind.family, num_layers, without_rope),
        )
        if fields.problems:
            raise CheckpointError(
                f"{origin}: not a configuration this version can export\n  " + "\n  ".join(fields.problems),
                hint="docs/checkpoints.md lists what can be exported",
            )
        return config

    def model_values(self) -> dict[str, Any]:
        """The keys of a config.json that decide what is computed, every one of them checked, for the PyTorch model.

        What else a file says (which kernel to use, what to print, how to train) is nobody's business there.
        """
        values: dict[str, Any] = {
            "model_type": self.family.name,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope.parameters(),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            **_rope_layers(self.family, self.num_layers, self.layers_without_rope),
            **self.multipliers.values(),
        }
        return values if self.routing is None else values | self.routing.values(self.num_layers, self.family)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must hold, by its Hugging Face name, routers included.

        Linear weights are [out, in]. A tied head has no tensor of its own.
        """
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            for module in filter(self.has, self.family.layer):
                for tensor, axes in module.tensors().items():
                    if tensor == module.weight or self.has_bias(module):
                        shapes[layer_tensor_name(layer, tensor)] = tuple(self._axis_size(axis) for axis in axes)
        shapes[FINAL_NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
        for layer in self.routing.layers if self.routing else ():
            shapes[router_name(layer)] = (1, self.hidden_size)
        return shapes

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5) if self.multipliers.attention is None else self.multipliers.attention

    def has(self, module: LayerModule) -> bool:
        """Whether a layer has a module."""
        return module.only_with is None or bool(getattr(self, module.only_with))

    def has_bias(self, module: LayerModule) -> bool:
        """Whether a layer's projection has a bias."""
        return module.bias is not None and bool(getattr(self, module.bias))

    def _axis_size(self, axis: Axis) -> int:
        sizes: dict[Axis, int] = {
            "query": self.num_heads * self.head_dim,
            "key-value": self.num_kv_heads * self.head_dim,
            "head": self.head_dim,
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
        }
        return sizes[axis]


def _own_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of an artefact's config.json as those of the checkpoint it was made from."""
    if OWN_MODEL_TYPE not in values:
        return values
    kept = {name: value for name, value in values.items() if name != OWN_MODEL_TYPE}
    return {**kept, "model_type": values[OWN_MODEL_TYPE]}


def _reject_unsupported(fields: JsonFields) -> None:
    values = fields.values
    if (activation := values.get("hidden_act") or "silu") not in ("silu", "swish"):
        fields.problem("hidden_act", f"is {activation!r}, expected 'silu'")
    for name in ("quantization_config", "compression_config", "quantization"):  # the last is MLX's
        if (quantised := values.get(name)) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            found = f"says quant_method {method!r}" if isinstance(method, str) else "is set"
            fields.problem(name, f"{found}, expected unquantised weights")
    if (kernel := values.get("attn_implementation")) not in (None, *_ATTENTION_KERNELS):
        fields.problem("attn_implementation", f"is {kernel!r}, expected one of {', '.join(_ATTENTION_KERNELS)}")
    for name in _EXTRA_OUTPUTS:
        if values.get(name) not in (None, False):
            fields.problem(name, f"is {values[name]!r}, expected false: an artefact's outputs are logits and the cache")


def _layers_without_rope(fields: JsonFields, family: Family, num_layers: int) -> tuple[int, ...]:
    """As config.json lists them, or every so-manieth."""
    if not family.skips_rope or not fields.are_valid("num_hidden_layers"):
        return ()
    listed = fields.values.get("no_rope_layers")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval")
        return tuple(range(interval - 1, num_layers, interval))
    # What the field lists is who does rotate. It may be longer than the model.
    if not isinstance(listed, list) or len(listed) < num_layers or any(flag not in (0, 1) for flag in listed):
        fields.problem("no_rope_layers", f"is {listed!r}, expected 1 or 0 for each of {num_layers} layers")
        return ()
    return tuple(layer for layer in range(num_layers) if not listed[layer])


def _rope_layers(family: Family, num_layers: int, without: tuple[int, ...]) -> dict[str, Any]:
    """The key of a config.json that says which layers rotate queries and keys; none for families that all do."""
    return {"no_rope_layers": [int(layer not in without) for layer in range(num_layers)]} if family.skips_rope else {}


def _multipliers(fields: JsonFields, family: Family) -> Multipliers:
    if not family.has_multipliers:
        return Multipliers()
    return Multipliers(
        embedding=fields.positive_number("embedding_multiplier"),
        attention=fields.positive_number("attention_multiplier"),
        residual=fields.positive_number("residual_multiplier"),
        logits=fields.positive_number("logits_scaling"),
    )


def _pad_token(fields: JsonFields, vocab_size: int) -> int | None:
    token = fields.token("pad_token_id", default=None)
    # One behind the last is common: a padding token was added to the tokenizer, and no row to the embedding.
    if token is not None and fields.are_valid("vocab_size") and token > vocab_size:
        fields.problem("pad_token_id", f"is {token}, expected at most vocab_size ({vocab_size})")
        return None
    return token


def _injected_layer_problems(entries: Any, num_layers: int) -> list[str]:
    if entries is None:
        return []
    if not isinstance(entries, list):
        return [f"injected_layers is {entries!r}, expected a list of objects with position, source and init"]
    # Sources are counted in the model that was there first. It had more layers than are left beside the injected ones
    # where others were removed since.
    return injected_layer_problems(entries, num_layers, MAX_LAYERS)


def _head_dim(fields: JsonFields, hidden_size: int, num_heads: int) -> int:
    given = fields.values.get("head_dim") is not None
    if not given and not fields.are_valid("hidden_size", "num_attention_heads"):
        return 1
    if not given and hidden_size % num_heads:
        fields.problem("hidden_size", f"is {hidden_size}, expected a multiple of num_attention_heads ({num_heads})")
        return 1
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if fields.are_valid("head_dim") and head_dim % 2:
        fields.problem("head_dim", f"is {head_dim}, expected an even number (rotary embedding turns pairs)")
    return head_dim


def _routing(fields: JsonFields, model_type: ModelType, num_layers: int) -> RoutingConfig | None:
    if (problem := kv_problem(fields.values)) is not None:
        fields.problem(KV_KEY, problem)
        return None
    kind = routing_kind(fields.values)
    layers = _routed_layers(fields, num_layers, optional=kind is None)
    thresholds = _thresholds(fields, model_type, layers)
    if not layers:
        return None
    if kind is None:
        own = fields.values["model_type"]
        fields.problem("is_dlo", f"marks routed layers, but model_type {own!r} does not say what they skip")
        return None
    # No defaults here: the authors' code has four contradicting sets of them, and a wrong one changes every output.
    if not fields.flag("rescale_hidden_states"):
        return RoutingConfig(kind, layers, rescale=False, scale_factor=2.0, scale_gap=0.0, thresholds=thresholds)
    return RoutingConfig(
        kind,
        layers,
        rescale=True,
        scale_factor=fields.number("scale_factor"),
        scale_gap=fields.number("scale_gap"),
        thresholds=thresholds,
    )


def _thresholds(fields: JsonFields, model_type: ModelType, layers: tuple[int, ...]) -> dict[int, float]:
    entries = fields.values.get(THRESHOLDS)
    problems = threshold_problems(entries, layers if fields.are_valid("is_dlo", "num_hidden_layers") else None)
    fields.problems += problems
    if problems or not entries:
        return {}
    if model_type.routing is not None and not model_type.thresholds:
        expected = routed_type(model_type.routing, thresholds=True).name
        fields.problem(
            THRESHOLDS, f"is set, but readers of a {model_type.name} look for none: expected model_type {expected!r}"
        )
        return {}
    return read_thresholds(entries)


def _routed_layers(fields: JsonFields, num_layers: int, *, optional: bool) -> tuple[int, ...]:
    is_dlo = fields.values.get("is_dlo")
    if optional and is_dlo is None:
        return ()
    # The authors write a single bool for "every layer" or "no layer".
    per_layer = [is_dlo] * num_layers if isinstance(is_dlo, bool) else is_dlo
    if not isinstance(per_layer, list) or not all(isinstance(item, bool) for item in per_layer):
        fields.problem("is_dlo", f"is {is_dlo!r}, expected true, false or a list of them")
        return ()
    if fields.are_valid("num_hidden_layers") and len(per_layer) != num_layers:
        fields.problem("is_dlo", f"has {len(per_layer)} entries, expected num_hidden_layers ({num_layers})")
        return ()
    return tuple(index for index, routed in enumerate(per_layer) if routed)


def _dtype(values: Mapping[str, Any]) -> str | None:
    dtype = values.get("dtype") or values.get("torch_dtype")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None
