"""What an artefact's config.json says, so that programs which run graphs open it: optimum, transformers.js."""

from __future__ import annotations

from typing import Any

from dlo_export.checkpoints.config import OWN_MODEL_TYPE
from dlo_export.exporter.sources.source import ExportSource


def client_config(source: ExportSource) -> dict[str, Any]:
    """The keys of the artefact's config.json that differ from the base model's.

    To whoever runs it, the graph is a Llama with a KV cache: routing happens inside. So model_type is "llama", and
    what is needed to make an empty cache is said outright, not left to a default. Depth and routing stay beside it in
    the keys they have in checkpoints, with the model's own type, which is what `LlamaConfig` reads.

    Where layers are skipped whole, their state of activity has to be carried from step to step besides, which those
    programs do not: the model keeps its own type, so that they refuse it when they open it.

    Args:
        source: What is exported.

    Returns:
        Depth and routing only where the source has no config.json of its own.
    """
    values, config = source.config_values(), source.base.config
    if config is None:
        return values
    values = {**values, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
    if source.remembers_activity:
        return values
    own_type = values.get("model_type", config.raw["model_type"])
    return {
        **values,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **({OWN_MODEL_TYPE: own_type} if own_type != "llama" else {}),
    }
