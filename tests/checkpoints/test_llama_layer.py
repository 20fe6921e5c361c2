"""The table of a layer's weights, held against transformers' layer and the gguf package's names."""

import gguf
import torch
from transformers import LlamaConfig as TransformersConfig
from transformers import Olmo2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from dlo_export.checkpoints import llama_layer
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, OLMO2_LAYER

SIZES = {"hidden": 24, "query": 32, "key-value": 16, "intermediate": 40, "head": 8}


def _config(*, biases: bool) -> TransformersConfig:
    return TransformersConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        vocab_size=11,
        num_hidden_layers=1,
        attention_bias=biases,
        mlp_bias=biases,
    )


def _shapes(layer: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def _expected(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(SIZES[axis] for axis in LLAMA_LAYER.axes[name]) for name in names}


def test_table_equals_transformers_layer_when_biases_are_there_or_not() -> None:
    norms = [module.weight for module in LLAMA_LAYER if module.only_with == "qk_norm"]
    with torch.device("meta"):
        plain, biased = (LlamaDecoderLayer(_config(biases=biases), 0) for biases in (False, True))
        normed = Qwen3DecoderLayer(Qwen3Config(**_config(biases=False).to_dict()), 0)
    assert _shapes(plain) == _expected(*LLAMA_LAYER.required)
    assert _shapes(biased) == _expected(*(name for name in LLAMA_LAYER.axes if name not in norms))
    assert _shapes(normed) == _expected(*LLAMA_LAYER.required, *norms)


def test_table_equals_olmo2s_layer_when_norms_stand_behind() -> None:
    with torch.device("meta"):
        layer = Olmo2DecoderLayer(Olmo2Config(**_config(biases=False).to_dict()), 0)
    names = [module.weight for module in OLMO2_LAYER]
    assert _shapes(layer) == {name: tuple(SIZES[axis] for axis in OLMO2_LAYER.axes[name]) for name in names}


def test_outer_names_are_transformers_when_a_model_is_built() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(_config(biases=False))
    outer = {name for name, _ in model.named_parameters() if llama_layer.parse_layer_tensor(name) is None}
    assert outer == set(llama_layer.GGUF_OUTER_NAMES.values())


def test_gguf_names_are_the_packages_when_looked_up_by_hugging_face_names() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.OLMO2, 2)
    for module in OLMO2_LAYER:
        assert names.get_name(f"model.layers.1.{module.path}") == f"blk.1.{module.gguf}"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for module in LLAMA_LAYER:
        assert names.get_name(f"model.layers.1.{module.path}") == f"blk.1.{module.gguf}"
    for name, ours in llama_layer.GGUF_OUTER_NAMES.items():
        assert names.get_name(ours.removesuffix(".weight")) == name.removesuffix(".weight")


def test_names_are_parsed_as_they_are_written() -> None:
    name = llama_layer.layer_tensor_name(11, LLAMA_LAYER["k_proj"].weight)
    assert name == "model.layers.11.self_attn.k_proj.weight"
    assert llama_layer.parse_layer_tensor(name) == (11, "self_attn.k_proj.weight")
    assert llama_layer.parse_router(llama_layer.router_name(3)) == 3
    others = ["model.layers.01.mlp.up_proj.weight", "model.routers.1.bias", "model.norm.weight"]
    # More digits than Python makes an integer of, and those of another script.
    for number in ("9" * 5000, "1\u0663"):
        others += [f"model.layers.{number}.mlp.up_proj.weight", f"model.routers.{number}.weight"]
    for other in others:
        assert llama_layer.parse_layer_tensor(other) is None
        assert llama_layer.parse_router(other) is None
