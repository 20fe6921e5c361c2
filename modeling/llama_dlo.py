"""The routed Llama in PyTorch: the reference every export is compared with.

Importing this module registers the model with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` opens routed checkpoints, ours and the DLO authors', without remote code::

    import dlo_export.modeling.llama_dlo
    model = AutoModelForCausalLM.from_pretrained("routed-model")

Attention, MLP, norms and rotary embedding are transformers' own; what is added is one router per routed layer
(``model.routers.{layer}.weight`` [1, hidden]) and the choice, per token, whether the MLP, attention, or
the whole layer, runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import (
    LLAMA,
    MODEL_TYPES,
    ROUTED_BLOCKS,
    ModelType,
    RoutingKind,
    leaves_keys,
    routed_type,
)
from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.active_cache import add_active_state
from dlo_export.modeling.configuration import (
    CONFIGURATIONS,
    LlamaDloAttentionConfig,
    LlamaDloConfig,
    LlamaDloLayerConfig,
    LlamaDloLayerThresholdsConfig,
    LlamaDloThresholdsConfig,
)
from dlo_export.modeling.decoder_layer import ROUTED_LAYERS
from dlo_export.modeling.family_modules import StepRotaryEmbedding, language_head, rms_norm, token_embedding
from dlo_export.modeling.routing import GateTokens, SelectTokens, TokenRouter, TrainingRouting
from dlo_export.modeling.skip_kernels import SkipKernels, check_machine, checked_choice


class UntrainedRoutersWarning(UserWarning):
    """Routers that are all zeros make every token skip."""


@dataclass
class LlamaDloModelOutput(BaseModelOutputWithPast):
    """A base model's output, and the routers' scores: by layer, float32 [batch, sequence].

    `training_routing` is there where `select_tokens` was given.
    """

    router_scores: dict[int, torch.Tensor] | None = None
    training_routing: dict[int, TrainingRouting] | None = None


@dataclass
class LlamaDloCausalLMOutput(CausalLMOutputWithPast):
    """A causal model's output, and the routers' scores: by layer, float32 [batch, sequence].

    `training_routing` is there where `select_tokens` was given.
    """

    router_scores: dict[int, torch.Tensor] | None = None
    training_routing: dict[int, TrainingRouting] | None = None


class LlamaDloPreTrainedModel(LlamaPreTrainedModel):
    """What the routed models share with each other."""

    config: LlamaDloConfig
    config_class = LlamaDloConfig
    _no_split_modules = [  # noqa: RUF012 (transformers' own declaration)
        *("MlpRoutedLayer", "WhollyRoutedLayer", "AttentionRoutedLayer", "ActiveAttentionRoutedLayer")
    ]
    _keep_in_fp32_modules_strict = ["routers"]  # noqa: RUF012
    _can_compile_fullgraph = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TokenRouter):
            initialization.zeros_(module.weight)
        else:
            super()._init_weights(module)


class LlamaDloModel(LlamaDloPreTrainedModel):
    """The decoder without its head.

    Attributes:
        masked: Compute everything for every token and discard what skipped tokens would get, instead of really
            skipping. It is how the routing is defined, and never saved.
        skip_kernels: Whether routed MLPs run in the dlo kernels, so that the host waits for no decision: "auto" where
            they can, on CUDA with Triton; True, or an error says why not; False in PyTorch's operators. In inference
            alone, never where `masked`, and never saved.
    """

    def __init__(self, config: LlamaDloConfig) -> None:
        super().__init__(config)
        self.embed_tokens = token_embedding(config)
        layer_class = ROUTED_LAYERS[config.routing]
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(config.num_hidden_layers))
        # Keyed by layer: the numbers of layers without a router are missing from the tensors' names.
        self.routers = nn.ModuleDict({str(layer): TokenRouter(config.hidden_size) for layer in config.routed_layers})
        self.norm = rms_norm(config)
        self.rotary_emb = StepRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.masked = False
        self._skip_kernels: SkipKernels = "auto"
        self._is_trained = False
        self.post_init()

    def router(self, layer: int) -> TokenRouter | None:
        """The router of a layer, None where it is not routed."""
        if str(layer) not in self.routers:
            return None
        router = self.routers[str(layer)]
        assert isinstance(router, TokenRouter)
        return router

    @property
    def skip_kernels(self) -> SkipKernels:
        """See the class."""
        return self._skip_kernels

    @skip_kernels.setter
    def skip_kernels(self, wanted: SkipKernels) -> None:
        checked_choice(wanted)
        if wanted is True:
            if self.config.routing != "mlp":
                raise InputError(
                    f"skip_kernels True: this model's routing is {self.config.routing}, expected mlp",
                    hint='leave it at "auto": its tokens skip in PyTorch\'s operators',
                )
            check_machine(self.device)
        self._skip_kernels = wanted

    def _kernels_for_step(self, device: torch.device) -> SkipKernels:
        """What a step asks its layers for; the oracle and whatever has a gradient never ask for kernels."""
        learns = torch.is_grad_enabled()
        self._is_trained |= learns and self.training
        if self._skip_kernels is False or self.masked or learns:
            return False
        # A compiler traces operators, and autocast takes weights in another type than theirs.
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
            return False
        # An optimiser's state lies as its weights did when it was made: of a model that learns none are turned.
        return False if self._skip_kernels == "auto" and self._is_trained else self._skip_kernels

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        force_active: Mapping[int, torch.Tensor] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LlamaDloModelOutput:
        """Runs the decoder; arguments as transformers' Llama takes them.

        Args:
            input_ids: int64 [batch, sequence]; or `inputs_embeds`.
            attention_mask: int64 [batch, past + sequence], 0 at padding; left padding works. For a cache of fixed size,
                `generate()` gives finished masks, by kind of layer where config.json has `layer_types`.
            position_ids: int64 [batch, sequence].
            past_key_values: The cache of the tokens before. Every token writes it where MLPs are skipped, or attention
                alone. Where skipped tokens leave no keys, it is a DynamicCache that remembers who was active (see
                `add_active_state`).
            inputs_embeds: [batch, sequence, hidden].
            use_cache: Return a cache.
            force_active: Per layer, bool [batch, sequence]: decisions to use in place of the routers'.
            output_hidden_states: Return the residual stream before every layer, and the normalised one at the end.
            kwargs: Passed on to the layers and their attention; but for `select_tokens`, by routed layer training's
                decision in place of the router's, and `gate_tokens`, what it comes to.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; `force_active` for a layer without router;
                `select_tokens` behind cached tokens.
            CacheError: The cache is of a kind that cannot remember who was active.
            MachineError: `skip_kernels` is True, and the kernels do not run here.
            InputError: Likewise, and they do not take a layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LlamaDloModel: expected exactly one of input_ids and inputs_embeds")
        forced = dict(force_active or {})
        selected: Mapping[int, SelectTokens] = kwargs.pop("select_tokens", None) or {}
        gates: Mapping[int, GateTokens] = kwargs.pop("gate_tokens", None) or {}
        if unknown := sorted(forced.keys() - set(self.config.routed_layers)):
            raise ValueError(
                f"LlamaDloModel: force_active names layers {unknown}, which are not routed"
                f"\n\nhint: the routed layers are {list(self.config.routed_layers)}"
            )
        if selected and past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError("LlamaDloModel: select_tokens is for training, which takes no cached tokens")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # As in transformers' Llama: a cache unless told otherwise, positions behind it, one mask and one pair of
        # rotary tables for all layers.
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        hides_skipped = not leaves_keys(self.config.routing) and bool(self.config.routed_layers)
        if hides_skipped and past_key_values is not None:
            add_active_state(past_key_values, self.config.routed_layers, self.config.num_hidden_layers)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        if isinstance(attention_mask, Mapping):
            (attention_mask,) = attention_mask.values()  # layers are of one kind: all see everything before them
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            # A layer that hides its skipped tokens needs the mask as numbers, not as the wish to be causal.
            allow_is_causal_skip=not hides_skipped,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        thresholds, skip_kernels = self.config.thresholds, self._kernels_for_step(hidden_states.device)
        # Scores are kept, since parity compares them.
        router_scores: dict[int, torch.Tensor] = {}
        training_routing: dict[int, TrainingRouting] = {}
        streams = []
        for index, layer in enumerate(self.layers):
            streams.append(hidden_states)
            hidden_states, routing = layer(
                hidden_states,
                router=self.router(index),
                branch_scale=self.config.branch_scale,
                threshold=thresholds.get(index, ONE_HALF),
                force_active=forced.get(index),
                masked=self.masked,
                select_tokens=selected.get(index),
                gate_tokens=gates.get(index),
                skip_kernels=skip_kernels,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
            if isinstance(routing, TrainingRouting):
                training_routing[index] = routing
            if routing is not None:
                router_scores[index] = routing.scores if isinstance(routing, TrainingRouting) else routing
        hidden_states = self.norm(hidden_states)
        return LlamaDloModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*streams, hidden_states) if output_hidden_states else None,
            router_scores=router_scores,
            training_routing=training_routing or None,
        )


class LlamaDloForCausalLM(LlamaDloPreTrainedModel, GenerationMixin):
    """The routed Llama with its language head. The authors' name for it is LlamaDLOExAttnForCausalLM."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LlamaDloConfig) -> None:
        super().__init__(config)
        self.model = LlamaDloModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = language_head(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Opens a checkpoint as transformers does, and warns of routers that skip everything."""
        loaded = super().from_pretrained(*args, **kwargs)
        warn_of_untrained_routers(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def masked(self) -> bool:
        """Whether all is computed for skipped tokens too, and discarded, see `LlamaDloModel`."""
        return bool(self.model.masked)

    @masked.setter
    def masked(self, masked: bool) -> None:
        self.model.masked = masked

    @property
    def skip_kernels(self) -> SkipKernels:
        """Whether routed MLPs run in the dlo kernels, "auto", True or False, see `LlamaDloModel`.

        Raises:
            InputError: Set to something else; or to True where tokens skip more than MLPs.
            MachineError: Set to True where the kernels do not run.
        """
        wanted: SkipKernels = self.model.skip_kernels
        return wanted

    @skip_kernels.setter
    def skip_kernels(self, wanted: SkipKernels) -> None:
        self.model.skip_kernels = wanted

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> LlamaDloCausalLMOutput:
        """Runs the model.

        Args:
            input_ids: int64 [batch, sequence].
            labels: int64 [batch, sequence], -100 where a token does not count: also return the language loss.
            logits_to_keep: Compute logits for so many last tokens only; 0 for all.
            kwargs: See `LlamaDloModel.forward`.

        Returns:
            Logits [batch, sequence, vocabulary], the cache, and `router_scores` by layer.
        """
        loss_kwargs = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        outputs = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        return LlamaDloCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_scores=outputs.router_scores,
            training_routing=outputs.training_routing,
        )


class LlamaDloLayerForCausalLM(LlamaDloForCausalLM):
    """The same where tokens skip whole layers: the authors' LlamaDLOForCausalLM, here with a KV cache."""

    config: LlamaDloLayerConfig
    config_class = LlamaDloLayerConfig
    # Kernels that take no mask of numbers cannot hide a layer's skipped tokens.
    _supports_flash_attn = False
    _supports_flex_attn = False


class LlamaDloAttentionForCausalLM(LlamaDloForCausalLM):
    """The same where tokens skip attention, after Router-Tuning (arXiv 2410.13184)."""

    config: LlamaDloAttentionConfig
    config_class = LlamaDloAttentionConfig
    # Kernels that take no mask of numbers cannot hide skipped tokens.
    _supports_flash_attn = False
    _supports_flex_attn = False


ROUTED_MODELS: Mapping[RoutingKind, type[LlamaDloForCausalLM]] = {
    "mlp": LlamaDloForCausalLM,
    "layer": LlamaDloLayerForCausalLM,
    "attention": LlamaDloAttentionForCausalLM,
    "attention-active": LlamaDloAttentionForCausalLM,
}
"""The model of each kind of routing."""


class LlamaDloThresholdsForCausalLM(LlamaDloForCausalLM):
    """The same model, under the type of checkpoints whose routers have thresholds."""

    config: LlamaDloThresholdsConfig
    config_class = LlamaDloThresholdsConfig


class LlamaDloLayerThresholdsForCausalLM(LlamaDloLayerForCausalLM):
    """The same model, under the type of checkpoints whose routers have thresholds."""

    config: LlamaDloLayerThresholdsConfig
    config_class = LlamaDloLayerThresholdsConfig


THRESHOLD_MODELS: Mapping[RoutingKind, type[LlamaDloForCausalLM]] = {
    "mlp": LlamaDloThresholdsForCausalLM,
    "layer": LlamaDloLayerThresholdsForCausalLM,
    "attention": LlamaDloAttentionForCausalLM,
    "attention-active": LlamaDloAttentionForCausalLM,
}
"""The same where routers have thresholds."""


def _family_model(kind: ModelType) -> type[LlamaDloForCausalLM]:
    """The same model under the type of another family, whose attention its layers have."""
    assert kind.routing is not None, "asked for routed types"
    assert kind.architecture is not None, "asked for routed types"
    llama = (THRESHOLD_MODELS if kind.thresholds else ROUTED_MODELS)[kind.routing]
    doc = f"A {kind.family.prefix} routed as `{llama.__name__}` is."
    body = {"__doc__": doc, "__module__": __name__, "config_class": CONFIGURATIONS[kind.name]}
    return type(kind.architecture, (llama,), body)


MODELS: Mapping[str, type[LlamaDloForCausalLM]] = {
    model_class.config_class.model_type: model_class
    for model_class in (*ROUTED_MODELS.values(), *THRESHOLD_MODELS.values())
} | {
    kind.name: _family_model(kind)
    for kind in MODEL_TYPES.values()
    if kind.routing is not None and kind.family is not LLAMA
}
"""By model type."""
globals().update({model_class.__name__: model_class for model_class in MODELS.values()})


def model_class_of(kind: ModelType, *, thresholds: bool = False) -> type[LlamaDloForCausalLM]:
    """The model of a type: of a plain one, that which routes MLPs and has no router.

    Args:
        kind: Of config.json.
        thresholds: Whether any router has a threshold of its own, whatever the type says.
    """
    return MODELS[routed_type(kind.routing or "mlp", thresholds=thresholds, family=kind.family).name]


def identity_layers(model: PreTrainedModel, routing: RoutingKind) -> Iterator[int]:
    """Layers of which what can be skipped adds exactly nothing, as in an untrained zero_out layer.

    Args:
        model: A causal Llama, transformers' or ours.
        routing: What can be skipped.
    """
    for index, layer in enumerate(model.model.layers):
        ends = {"self_attn": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}
        if all(adds_nothing(ends[block]) for block in ROUTED_BLOCKS[routing]):
            yield index


def adds_nothing(projection: nn.Linear) -> bool:
    """Whether a branch's last projection is all zeros, bias included."""
    # The first row settles it for all but the zero matrices.
    zero = not projection.weight[0].any() and not projection.weight.any()
    return zero and (projection.bias is None or not projection.bias.any())


def skipping_at_zero(config: LlamaDloConfig) -> tuple[int, ...]:
    """Routed layers that an all-zero router makes skip every token: not those whose threshold is below one half."""
    return tuple(layer for layer in config.routed_layers if config.threshold(layer) >= ONE_HALF)


def warn_of_untrained_routers(model: LlamaDloForCausalLM) -> None:
    """Warns of layers that skip every token because their router is all zeros, except where that is harmless."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    zero = {layer for layer in skipping_at_zero(model.config) if not model.model.router(layer).weight.any()}
    routing = model.config.routing
    if zero and (untrained := sorted(zero - set(identity_layers(model, routing)))):
        skipped = {"mlp": "their MLPs are", "layer": "they are"}.get(routing, "their attention is")
        warnings.warn(
            f"the routers of layers {untrained} are all zeros: every score is exactly 0.5, so {skipped} skipped "
            "for every token\n\nhint: fit them with `dlo calibrate`, train them, or set is_dlo to false there",
            UntrainedRoutersWarning,
            stacklevel=3,
        )


for routed_model in MODELS.values():
    AutoModelForCausalLM.register(routed_model.config_class, routed_model, exist_ok=True)
