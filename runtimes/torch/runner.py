"""Runs a PyTorch Llama, plain or routed: transformers' LlamaForCausalLM, our LlamaDloForCausalLM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import dlo_export.modeling.llama_dlo  # noqa: F401 - registers the routed models with AutoModelForCausalLM
from dlo_export.runtimes.errors import ModelLoadError, StepError
from dlo_export.runtimes.runner import Decisions, FloatArray, Int64Array, StepResult, check_step

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRunner:
    """A `Runner` of a transformers model.

    Args:
        model: With `model.layers`, and a forward that takes `past_key_values`; `force_active` where it is routed.
        masked: Compute every token's MLP and mask skipped ones, as routing is defined (the oracle), instead of really
            skipping. Without routers there is no difference.
        name: For reports.
    """

    def __init__(self, model: Any, *, masked: bool = False, name: str = "PyTorch") -> None:
        self._name = name
        self._model = model.eval()
        self._routed: tuple[int, ...] = getattr(model.config, "routed_layers", ())
        if self._routed:
            model.masked = masked
        self._batch: int | None = None
        self._cache = DynamicCache()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
        masked: bool = False,
        name: str | None = None,
    ) -> Self:
        """Opens a checkpoint folder, whole, in memory.

        Args:
            folder: In Hugging Face form; nothing is downloaded, no code of the folder runs.
            dtype: Of the weights; routers stay float32.
            masked: See the class.
            name: For reports; "PyTorch" and the folder's name by default.

        Raises:
            ModelLoadError: There is no such checkpoint, or transformers cannot read it.
        """
        if not (Path(folder) / "config.json").is_file():
            raise ModelLoadError(f"{folder}: has no config.json, expected a checkpoint folder in Hugging Face form")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True
            )
        except OSError as err:
            raise ModelLoadError(f"{folder}: transformers cannot open it: {err}") from err
        return cls(model, masked=masked, name=name or f"PyTorch {Path(folder).name}")

    @property
    def name(self) -> str:
        """See `Runner`."""
        return self._name

    @property
    def num_layers(self) -> int:
        """See `Runner`."""
        return int(self._model.config.num_hidden_layers)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """See `Runner`."""
        return self._routed

    def reset(self, batch: int) -> None:
        """See `Runner`."""
        self._batch = batch
        self._cache = DynamicCache()

    def step(
        self,
        input_ids: Int64Array,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        *,
        force_active: Decisions | None = None,
        last_logits: bool = False,
        hidden_states: bool = False,
    ) -> StepResult:
        """See `Runner`."""
        if self._model is None:
            raise StepError(f"{self._name}: step after the runner was closed")
        past = self._cache.get_seq_length()
        check_step(self, self._batch, past, input_ids, attention_mask, position_ids, force_active)
        forced = {layer: torch.from_numpy(decisions) for layer, decisions in (force_active or {}).items()}
        streams: dict[int, torch.Tensor] = {}
        with torch.inference_mode(), _captured(self._model.model.layers if hidden_states else [], streams):
            output = self._model(
                input_ids=torch.from_numpy(input_ids),
                attention_mask=torch.from_numpy(attention_mask),
                position_ids=torch.from_numpy(position_ids),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if last_logits else 0,
                **({"force_active": forced} if forced else {}),
            )
        scores = getattr(output, "router_scores", None) or {}
        return StepResult(
            _array(output.logits),
            {layer: _array(values) for layer, values in scores.items()},
            {layer: _array(values) for layer, values in streams.items()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache = DynamicCache()
        self._model = None


@contextlib.contextmanager
def _captured(layers: Any, streams: dict[int, torch.Tensor]) -> Iterator[None]:
    """Notes each layer's output; transformers' own hidden states end with the normalised stream instead."""

    def capture(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            streams[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layer.register_forward_hook(capture(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _array(values: torch.Tensor) -> FloatArray:
    array: FloatArray = values.float().numpy()
    return array
