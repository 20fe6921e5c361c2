"""A model's weights as a step at fixed shapes reads them, in storage that the model goes on using.

Products that share an input become one matrix, whose rows the model's own layers see as theirs. The kernels of routed
MLPs read [in, out]; the model's layers see the transpose. So nothing is kept twice; `StepWeights.release` undoes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaRMSNorm

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.skip_kernels import KernelMlp, size_problems, turned_mlp
from dlo_export.runtimes.errors import ModelLoadError


@dataclasses.dataclass(frozen=True)
class Product:
    """A linear layer, or several with one input.

    Attributes:
        weight: T [out, in].
        bias: T [out] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [n, in] times the weight, [n, out]."""
        return nn.functional.linear(rows, self.weight, self.bias)


@dataclasses.dataclass(frozen=True)
class PlainMlp:
    """An MLP as two products.

    Attributes:
        gate_up: Both projections, gate first.
        down: The third.
    """

    gate_up: Product
    down: Product


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer.

    Attributes:
        attention_norm: T [hidden].
        qkv: Queries, keys and values.
        out: Attention's last projection.
        mlp_norm: T [hidden].
        mlp: In the form that computes it; None where the layer has none, and is attention alone.
        router: float32 [hidden], None where no token skips.
    """

    attention_norm: torch.Tensor
    qkv: Product
    out: Product
    mlp_norm: torch.Tensor
    mlp: PlainMlp | KernelMlp | None
    router: torch.Tensor | None


class StepWeights:
    """Of a model; several decoders may share them.

    Args:
        model: transformers' LlamaForCausalLM, or our LlamaDloForCausalLM that routes MLPs; in the dtype and on the
            device to run on.
        kernels: Routed MLPs are to run in the dlo kernels, which really skip; else all is computed and masked. None
            asks for them where they take the model.

    Attributes:
        model: As given.
        layers: By index.
        branch_scale: (a, b): an active token's MLP branch is multiplied by a + b · score.
        thresholds: By layer: what an active token's score exceeds.

    Raises:
        ModelLoadError: Whole layers are routed; or the kernels do not take these MLPs.
    """

    def __init__(self, model: LlamaForCausalLM | LlamaDloForCausalLM, *, kernels: bool | None = None) -> None:
        config = model.config
        routed: tuple[int, ...] = getattr(config, "routed_layers", ())
        if routed and config.routing != "mlp":
            raise ModelLoadError(
                "captured decode: this model's tokens skip whole layers, expected MLPs alone",
                hint="run it with TorchRunner",
            )
        if foreign := _foreign_parts(model):
            raise ModelLoadError(
                f"captured decode: this model has {', '.join(foreign)}; expected a Llama's layers with silu",
                hint="run it with TorchRunner",
            )
        problems = size_problems(config) if routed else []
        if kernels and problems:
            raise ModelLoadError(
                f"captured decode: the kernels of routed MLPs got a model with {'; '.join(problems)}",
                hint="open it with kernels=False: all is computed, and masked",
            )
        self.model: Any = model
        self._changed: list[nn.Linear] = []
        self._kernels = not problems if kernels is None else kernels
        self.layers = [self._layer(index, index in routed) for index in range(config.num_hidden_layers)]
        self.branch_scale: tuple[float, float] = config.branch_scale if routed else (1.0, 0.0)
        self.thresholds = [config.threshold(index) if routed else ONE_HALF for index in range(len(self.layers))]

    def release(self) -> None:
        """Gives every layer of the model storage of its own again; the decoders end with it."""
        self.layers = []
        for linear in self._changed:
            linear.weight.data = linear.weight.data.clone(memory_format=torch.contiguous_format)
        self._changed = []

    def _layer(self, index: int, routed: bool) -> LayerWeights:
        layer: Any = self.model.model.layers[index]  # a module, whose parts its class declares nowhere
        attention = layer.self_attn
        return LayerWeights(
            layer.input_layernorm.weight.data,
            self._joined([attention.q_proj, attention.k_proj, attention.v_proj]),
            Product(attention.o_proj.weight.data, _bias([attention.o_proj])),
            layer.post_attention_layernorm.weight.data,
            self._mlp(layer.mlp, kernels=self._kernels and routed),
            self.model.model.router(index).weight.data.float().reshape(-1) if routed else None,
        )

    def _mlp(self, mlp: LlamaMLP, *, kernels: bool) -> PlainMlp | KernelMlp:
        if kernels:
            self._changed += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            return turned_mlp(mlp)
        return PlainMlp(
            self._joined([mlp.gate_proj, mlp.up_proj]), Product(mlp.down_proj.weight.data, _bias([mlp.down_proj]))
        )

    def _joined(self, linears: Sequence[nn.Linear]) -> Product:
        weight = torch.cat([linear.weight.data for linear in linears])
        for linear, rows in zip(linears, torch.split(weight, [linear.out_features for linear in linears]), strict=True):
            linear.weight.data = rows
        self._changed += linears
        return Product(weight, _bias(linears))


def _foreign_parts(model: LlamaForCausalLM | LlamaDloForCausalLM) -> list[str]:
    """What of a model's layers is computed otherwise than a Llama's."""
    parts: dict[type, type] = {type(model.model.norm): LlamaRMSNorm}
    layers: Any = model.model.layers
    for layer in layers:
        parts |= {type(layer.self_attn): LlamaAttention, type(layer.mlp): LlamaMLP}
        norms = (part for part in layer.children() if part not in (layer.self_attn, layer.mlp))
        parts |= {type(norm): LlamaRMSNorm for norm in norms}
    foreign = [found.__name__ for found, expected in parts.items() if found is not expected]
    rope = (model.config.rope_parameters or {}).get("rope_type")
    if rope in {"dynamic", "longrope"}:  # its tables depend on how far a step reaches, these are made once
        foreign.append(f"rope of kind {rope}")
    return foreign + ([] if model.config.hidden_act in {"silu", "swish"} else [model.config.hidden_act])


def _bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None
