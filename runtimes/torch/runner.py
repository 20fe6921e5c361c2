"""Runs a PyTorch Llama, plain or routed: transformers' LlamaForCausalLM, our LlamaDloForCausalLM.

Where tokens skip whole layers, the model itself has the cache remember which of its tokens were active: what a graph
takes and gives as `past_active.{i}` and `present_active.{i}`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import dlo_export.modeling.llama_dlo  # noqa: F401 - registers the routed models with AutoModelForCausalLM
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.modeling.devices import torch_device
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.runner import FloatArray, Runner, StepRequest, StepResult


class TorchRunner(Runner):
    """Of a transformers model.

    Args:
        model: With `model.layers`, and a forward that takes `past_key_values`; `force_active` where it is routed.
        masked: Compute everything for every token and mask what skipped ones would get, as routing is defined (the
            oracle), instead of really skipping. Without routers there is no difference.
        name: For reports.
        device: Where the model is and computes.
    """

    def __init__(
        self,
        model: Any,
        *,
        masked: bool = False,
        name: str = "PyTorch",
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    ) -> None:
        routed: tuple[int, ...] = getattr(model.config, "routed_layers", ())
        thresholds = model.config.thresholds if routed else None
        super().__init__(
            name, num_layers=int(model.config.num_hidden_layers), routed_layers=routed, thresholds=thresholds
        )
        self._model = model.eval()
        self._device = device
        if routed:
            # A runner is what kernels are held against: PyTorch's operators, whatever the machine.
            model.masked, model.skip_kernels = masked, False
        self._cache = DynamicCache()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: str = "fp32",
        masked: bool = False,
        name: str | None = None,
        device: str = "cpu",
    ) -> Self:
        """Opens a checkpoint folder, whole, in memory.

        Args:
            folder: In Hugging Face form; nothing is downloaded, no code of the folder runs.
            dtype: Of the weights, "fp32", "fp16" or "bf16"; routers stay float32.
            masked: As for the class.
            name: For reports; "PyTorch" and the folder's name by default.
            device: Where to compute, as `--device` names it.

        Raises:
            MachineError: There is no such device.
            ModelLoadError: There is no such checkpoint or dtype, or transformers cannot read it.
        """
        place = torch_device(device)
        if dtype not in BY_OPTION:
            raise ModelLoadError(f"{folder}: there is no dtype {dtype}", hint=f"choose one of {', '.join(BY_OPTION)}")
        if not (Path(folder) / "config.json").is_file():
            raise ModelLoadError(
                f"{folder}: has no config.json, expected a checkpoint folder in Hugging Face form",
                hint="give the folder that holds config.json and the .safetensors files",
            )
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=getattr(torch, BY_OPTION[dtype].name), local_files_only=True, use_safetensors=True
            )
        except OSError as err:
            raise ModelLoadError(
                f"{folder}: transformers cannot open it: {err}",
                hint="the folder holds .safetensors files of this model",
            ) from err
        return cls(model.to(place), masked=masked, name=name or f"PyTorch {Path(folder).name}", device=place)

    def _empty_cache(self, batch: int) -> None:
        self._cache = DynamicCache()

    def _repeat_cache(self, branches: int) -> None:
        self._cache.batch_repeat_interleave(branches)

    def _compute(self, request: StepRequest) -> StepResult:
        forced = {layer: self._placed(decisions) for layer, decisions in (request.force_active or {}).items()}
        streams: dict[int, torch.Tensor] = {}
        layers = self._model.model.layers if request.hidden_states else []
        with torch.inference_mode(), captured_layers(layers, streams):
            output = self._model(
                input_ids=self._placed(request.input_ids),
                attention_mask=self._placed(request.attention_mask),
                position_ids=self._placed(request.position_ids),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if request.last_logits else 0,
                **({"force_active": forced} if forced else {}),
            )
        scores = getattr(output, "router_scores", None) or {}
        return StepResult(
            float32_array(output.logits),
            {layer: float32_array(values) for layer, values in scores.items()},
            {layer: float32_array(values) for layer, values in streams.items()},
        )

    def _placed(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _free(self) -> None:
        self._cache = DynamicCache()
        self._model = None


@contextlib.contextmanager
def captured_layers(layers: Any, streams: dict[int, torch.Tensor]) -> Iterator[None]:
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


def float32_array(values: torch.Tensor) -> FloatArray:
    """On the host."""
    array: FloatArray = values.float().cpu().numpy()
    return array
