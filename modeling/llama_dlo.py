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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from dlo_export.checkpoints.model_types import LLAMA, MODEL_TYPES, ModelType, routed_type
from dlo_export.modeling.configuration import (
    CONFIGURATIONS,
    LlamaDloAttentionConfig,
    LlamaDloConfig,
    LlamaDloLayerConfig,
    LlamaDloLayerThresholdsConfig,
    LlamaDloThresholdsConfig,
)
from dlo_export.modeling.decoder import LlamaDloModel, LlamaDloPreTrainedModel
from dlo_export.modeling.family_modules import language_head
from dlo_export.modeling.routing import TrainingRouting
from dlo_export.modeling.skip_kernels import SkipKernels
from dlo_export.modeling.untrained_routers import warn_of_untrained_routers


@dataclass
class LlamaDloCausalLMOutput(CausalLMOutputWithPast):
    """A causal model's output, and the routers' scores: by layer, float32 [batch, sequence].

    `training_routing` is there where `select_tokens` was given.
    """

    router_scores: dict[int, torch.Tensor] | None = None
    training_routing: dict[int, TrainingRouting] | None = None


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


class LlamaDloThresholdsForCausalLM(LlamaDloForCausalLM):
    """The same model, under the type of checkpoints whose routers have thresholds."""

    config: LlamaDloThresholdsConfig
    config_class = LlamaDloThresholdsConfig


class LlamaDloLayerThresholdsForCausalLM(LlamaDloLayerForCausalLM):
    """The same model, under the type of checkpoints whose routers have thresholds."""

    config: LlamaDloLayerThresholdsConfig
    config_class = LlamaDloLayerThresholdsConfig


_LLAMAS = {
    model_class.config_class.model_type: model_class
    for model_class in (
        LlamaDloForCausalLM,
        LlamaDloThresholdsForCausalLM,
        LlamaDloLayerForCausalLM,
        LlamaDloLayerThresholdsForCausalLM,
        LlamaDloAttentionForCausalLM,
    )
}


def _family_model(kind: ModelType) -> type[LlamaDloForCausalLM]:
    """The same model under the type of another family, whose attention its layers have."""
    assert kind.routing is not None, "asked for routed types"
    assert kind.architecture is not None, "asked for routed types"
    llama = _LLAMAS[routed_type(kind.routing, thresholds=kind.thresholds).name]
    doc = f"A {kind.family.prefix} routed as `{llama.__name__}` is."
    body = {"__doc__": doc, "__module__": __name__, "config_class": CONFIGURATIONS[kind.name]}
    return type(kind.architecture, (llama,), body)


MODELS: Mapping[str, type[LlamaDloForCausalLM]] = _LLAMAS | {
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


for routed_model in MODELS.values():
    AutoModelForCausalLM.register(routed_model.config_class, routed_model, exist_ok=True)
