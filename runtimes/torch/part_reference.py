"""The PyTorch reference of a model in parts: one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from dlo_export.checkpoints.depth.reduction import reduced_config
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    layer_tensor_name,
    parse_layer_tensor,
    parse_router,
    router_name,
)
from dlo_export.modeling.from_tensors import empty_llama_dlo
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.runtimes.parity.by_layer import PartOutput
from dlo_export.runtimes.parity.cases import Feed
from dlo_export.runtimes.runner import BoolArray, FloatArray
from dlo_export.runtimes.torch.reference import block_tensors, load_block
from dlo_export.runtimes.torch.runner import captured_layers, float32_array


class TorchReference:
    """Opens a model's parts, each a model of one layer: the masked oracle in float32, on the CPU.

    Args:
        config: Of config.json.
        tensors: Under Hugging Face names.
    """

    name = "PyTorch, a layer at a time"

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> None:
        self._config = config
        self._tensors = tensors
        self.num_layers = int(config["num_hidden_layers"])

    @contextmanager
    def open_part(self, part: int) -> Iterator[TorchPart]:
        """Reads a part's weights, and drops them at the end.

        Args:
            part: 0 is the embedding, then come the layers, then the head.
        """
        # Embedding and head have no layer of their own: they come with any.
        layer = min(max(part - 1, 0), self.num_layers - 1)
        tensors = _layer_tensors(self._tensors, layer)
        # A layer's neighbours are not known to it: alone it is layer 0 of a model like its own.
        model = empty_llama_dlo({**self._config, **reduced_config(self._config, [layer])}, tensors)
        blocks: dict[str, torch.nn.Module] = {"model.norm": model.model.norm}
        if part == 0:
            blocks = {"model.embed_tokens": model.model.embed_tokens}
        elif part > self.num_layers:
            blocks["lm_head"] = model.lm_head
        else:
            blocks |= {"model.layers.0": model.model.layers[0], "model.routers": model.model.routers}
        for prefix, module in blocks.items():
            load_block(module, block_tensors(module, prefix, tensors), torch.float32, torch.device("cpu"))
        # The oracle: everything is computed for every token.
        model.masked = True
        yield TorchPart(model, part, self.num_layers)


class TorchPart:
    """An open part.

    Args:
        model: Of one layer; what the part needs of it has weights.
        part: Which one it is.
        num_layers: Of the whole model.
    """

    def __init__(self, model: LlamaDloForCausalLM, part: int, num_layers: int) -> None:
        self._model = model
        self._is_embedding, self._is_head = part == 0, part > num_layers
        self._cache = DynamicCache()

    def reset(self, batch: int) -> None:
        """Forgets the cached tokens."""
        del batch
        self._cache = DynamicCache()

    def step(self, stream: FloatArray | None, feed: Feed, active: BoolArray | None) -> PartOutput:
        """Runs a step behind the cached tokens.

        Args:
            stream: float32 [batch, sequence, hidden]; None in front of the embedding.
            feed: The step's tokens.
            active: Decisions in place of the router's; None lets it decide.
        """
        model = self._model
        with torch.inference_mode():
            if self._is_embedding:
                return PartOutput(float32_array(model.model.embed_tokens(torch.from_numpy(feed.input_ids))), None)
            hidden_states = torch.from_numpy(stream)
            if self._is_head:
                return PartOutput(float32_array(model.lm_head(model.model.norm(hidden_states))), None)
            streams: dict[int, torch.Tensor] = {}
            # The model goes on to its final norm; what leaves the layer is taken where it does.
            with captured_layers(model.model.layers, streams):
                output = model.model(
                    inputs_embeds=hidden_states,
                    attention_mask=torch.from_numpy(feed.attention_mask),
                    position_ids=torch.from_numpy(feed.position_ids),
                    past_key_values=self._cache,
                    use_cache=True,
                    force_active=None if active is None else {0: torch.from_numpy(active)},
                )
            scores = output.router_scores.get(0)
            return PartOutput(float32_array(streams[0]), None if scores is None else float32_array(scores))


def _layer_tensors(tensors: Mapping[str, LazyTensor], layer: int) -> dict[str, LazyTensor]:
    """Those of a model of this layer alone."""
    found = {name: tensors[name] for name in (EMBEDDING, FINAL_NORM, HEAD) if name in tensors}
    for name, tensor in tensors.items():
        if (place := parse_layer_tensor(name)) is not None and place.layer == layer:
            found[layer_tensor_name(0, place.tensor)] = tensor
        elif parse_router(name) == layer:
            found[router_name(0)] = tensor
    return found
