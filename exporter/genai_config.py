"""genai_config.json, so that onnxruntime-genai runs an artefact as it is."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.checkpoints.interface import (
    LOGITS,
    TOKEN_INPUTS,
    past_active_name,
    past_name,
    present_active_name,
    present_name,
)
from dlo_export.plugins.ort_registration import LIBRARY
from dlo_export.runtimes.onnxruntime.providers import CUDA

GENAI_CONFIG_NAME = "genai_config.json"
"""Beside model.onnx, where onnxruntime-genai looks for it."""

WHY_NONE = (
    "tokens that skip leave no keys: besides the KV cache, each step hands on which tokens skipped every routed layer "
    f"({past_active_name('{i}')}, {present_active_name('{i}')}). onnxruntime-genai, optimum and transformers.js carry "
    "no such state: genai_config.json is left out, and config.json names a model_type that they refuse. `dlo run` and "
    "programs that feed ONNX Runtime themselves run the graph, see docs/artefact.md"
)
"""Why an artefact has no genai_config.json, for the user to be told."""

WHY_NONE_STATIC = (
    "--static-cache: the graph is told how long each sequence is (kv_lengths) in place of an attention_mask, which is "
    "what onnxruntime-genai, optimum and transformers.js feed: genai_config.json is left out. `dlo run` and programs "
    "that feed ONNX Runtime themselves run the graph, see docs/artefact.md"
)
"""Likewise, where the cache is written in place."""


# The CPU is what runs where none is named. Options of CUDA's are ONNX Runtime's own, and strings: onnxruntime-genai
# hands them on as they are. With TensorFloat-32 fp32 would not be fp32, nor would the routers of a 16-bit graph.
_PROVIDER_OPTIONS: Mapping[ProviderOption, Mapping[str, Mapping[str, str]]] = {
    "cpu": {},
    "cuda": {"cuda": CUDA.options},
}
_OPERATOR_LIBRARY = "custom_ops_library"
_SHOWN = 40  # characters of a wrong value


def genai_config(
    config: LlamaConfig,
    num_layers: int,
    generation: GenerationConfig,
    inputs: Collection[str],
    provider: ProviderOption = "cpu",
) -> dict[str, Any]:
    """The file's content.

    Args:
        config: Of the base model.
        num_layers: Of the deepened model.
        generation: End tokens and sampling defaults.
        inputs: Names of the graph's inputs; those of other exporters may do without `position_ids`.
        provider: Of ONNX Runtime. CUDA's options are those that parity ran with.

    Returns:
        `past_present_share_buffer` is false because standard Attention grows its cache (onnxruntime-genai 0.18).
    """
    providers = [{name: dict(options)} for name, options in _PROVIDER_OPTIONS[provider].items()]
    return {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            **_special_tokens(config, generation),
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": num_layers,
                "inputs": {
                    **{name: name for name in TOKEN_INPUTS if name in inputs},
                    "past_key_names": past_name("%d", "key"),
                    "past_value_names": past_name("%d", "value"),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": present_name("%d", "key"),
                    "present_value_names": present_name("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": generation.do_sample,
            "early_stopping": True,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "repetition_penalty": generation.repetition_penalty,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
        },
    }


def check_genai_config(settings: Mapping[str, Any], path: Path) -> None:
    """Refuses settings that the functions below cannot change: somebody's, or an artefact's that was edited.

    Args:
        settings: As read.
        path: Of the file, to be named.

    Raises:
        CheckpointError: One of the objects that they change is none; `session_options` may be left out.
    """
    model = settings.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    session = decoder.get("session_options", {}) if isinstance(decoder, dict) else None
    places = {"model": model, "model.decoder": decoder, "model.decoder.session_options": session}
    for field, value in places.items():
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{path}: {field} is {json.dumps(value)[:_SHOWN]}, expected an object",
                hint="correct it, or take the file away",
            )


def carried_genai_config(given: Mapping[str, Any], num_layers: int, *, routed: bool) -> dict[str, Any]:
    """Somebody's genai_config.json for the deepened graph: how its cache is shared, which provider runs it, stays.

    Args:
        given: As it stood beside the graph.
        num_layers: Of the deepened model.
        routed: Whether it has routers now, whose products are float32: CUDA then gets what keeps them so, unless its
            entry says something of that.
    """
    model = given["model"]
    decoder = {**model["decoder"], "filename": "model.onnx", "num_hidden_layers": num_layers}
    session = decoder.get("session_options")
    if routed and isinstance(session, dict) and isinstance(providers := session.get("provider_options"), list):
        decoder["session_options"] = {**session, "provider_options": [_with_exact_products(one) for one in providers]}
    if isinstance(outputs := decoder.get("outputs"), dict):
        decoder["outputs"] = {**outputs, "logits": LOGITS}  # what the graph's are called now, if they were not
    return {**given, "model": {**model, "decoder": decoder}}


def _with_exact_products(entry: Any) -> Any:
    """An entry of `provider_options` with what CUDA needs to compute float32 in float32."""
    if not isinstance(entry, dict) or not isinstance(entry.get("cuda"), dict):
        return entry
    return {**entry, "cuda": {**CUDA.options, **entry["cuda"]}}


def with_operator_library(settings: Mapping[str, Any], *, needed: bool) -> dict[str, Any]:
    """Settings that name libdlo_ort.so where the graph has dlo operators, and do not where it has none.

    onnxruntime-genai looks for it beside genai_config.json, and says by name that it is missing; without the name it
    knows the operators' names alone.

    Args:
        settings: As the functions above make them, or as they stand in an artefact whose graph is another one now.
        needed: Whether the graph has dlo operators. A library that somebody else has named stays.
    """
    model = settings["model"]
    decoder = model["decoder"]
    session = dict(decoder.get("session_options", {}))
    if needed:
        session.setdefault(_OPERATOR_LIBRARY, LIBRARY)
    elif session.get(_OPERATOR_LIBRARY) == LIBRARY:
        del session[_OPERATOR_LIBRARY]
    if not session:
        return dict(settings)
    return {**settings, "model": {**model, "decoder": {**decoder, "session_options": session}}}


def _special_tokens(config: LlamaConfig, generation: GenerationConfig) -> dict[str, Any]:
    """Start, end and padding tokens in onnxruntime-genai's form, which has no null: a missing key says "none"."""
    ends = list(generation.eos_token_id)
    pad = generation.pad_token_id
    # Padding is masked but looked up in the embedding all the same; some models name a token behind their vocabulary.
    if pad is None or pad >= config.vocab_size:
        pad = ends[0] if ends else 0
    bos = {} if generation.bos_token_id is None else {"bos_token_id": generation.bos_token_id}
    return {**bos, "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}
