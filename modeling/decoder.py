"""The routed Llama's decoder: embedding, layers of which tokens skip a part, and the final norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, initialization
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import leaves_keys
from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.active_cache import add_active_state
from dlo_export.modeling.configuration import LlamaDloConfig
from dlo_export.modeling.decoder_layer import ROUTED_LAYERS
from dlo_export.modeling.family_modules import StepRotaryEmbedding, rms_norm, token_embedding
from dlo_export.modeling.routing import GateTokens, SelectTokens, TokenRouter, TrainingRouting
from dlo_export.modeling.skip_kernels import SkipKernels, check_machine, checked_choice


@dataclass
class LlamaDloModelOutput(BaseModelOutputWithPast):
    """A base model's output, and the routers' scores: by layer, float32 [batch, sequence].

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
