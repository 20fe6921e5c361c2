"""The models that are compared: the one they all come from, and what each method makes of it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.papers.moe import upcycle
from dlo_export.checkpoints.checkpoint_folder import save_checkpoint
from dlo_export.checkpoints.depth.expansion import (
    ExpansionPlan,
    expanded_config,
    expanded_tensors,
    placements,
    routed_config,
)
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.documents import open_tokenizer
from dlo_export.modeling.training.parameters import merged_state

MakeModel = Callable[["BaseModel"], LlamaDloForCausalLM]
_EXPERTS, _CHOSEN = 4, 2
# A new layer is made of its neighbours or of a mixture; with its outputs zeroed, of which makes no difference at first.
_TLI_VARIANTS = (
    *(("prev", "copy"), ("next", "copy"), ("mean", "copy"), ("slerp", "copy")),
    *(("prev", "zero_out"), ("next", "zero_out")),
)


class BaseModel:
    """The trained, dense model that everything is made from. A context manager.

    Args:
        path: A checkpoint folder or a `.gguf` file.

    Attributes:
        config: Its config.json.
        layers: How many it has.
        tokenizer: transformers', with a chat template.

    Raises:
        InputError: It is no checkpoint, has routers or no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoint = open_checkpoint(path)
        self.config: Mapping[str, Any] = self._checkpoint.config.raw
        self.layers: int = self.config["num_hidden_layers"]
        if self._checkpoint.config.routing is not None:
            raise InputError(f"{path}: has routers already", hint="give the dense model that it was made from")
        with tempfile.TemporaryDirectory() as folder:
            self._checkpoint.save_companions(Path(folder))
            self.tokenizer, _ = open_tokenizer(Path(folder), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoint.close()

    def sha256(self) -> str:
        """Identity of the weights."""
        return self._checkpoint.sha256()

    def encode(self, text: str) -> list[int]:
        """A text's tokens, none of them special."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    @functools.cached_property
    def _tensors(self) -> Mapping[str, LazyTensor]:
        """Read once: tens of models are made of them, and dequantising takes a second each time."""
        return {name: ArrayTensor(tensor.numpy()) for name, tensor in self._checkpoint.tensors.items()}

    def model(self) -> LlamaDloForCausalLM:
        """As it is, in fp32."""
        return llama_dlo_from_tensors(self.config, self._tensors)

    def expanded(self, plan: ExpansionPlan) -> LlamaDloForCausalLM:
        """Deepened."""
        config = {**self.config, **expanded_config(self.config, plan)}
        return llama_dlo_from_tensors(config, expanded_tensors(self._tensors, plan))

    def save(self, model: LlamaDloForCausalLM, folder: Path) -> None:
        """Writes a model that was made from this one as a checkpoint that `dlo-export` takes."""
        tensors: dict[str, LazyTensor] = {
            name: ArrayTensor(np.ascontiguousarray(value.cpu().numpy())) for name, value in merged_state(model)
        }
        config = model.config
        changes: dict[str, Any] = {
            "num_hidden_layers": config.num_hidden_layers,
            "injected_layers": config.injected_layers,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        if config.routed_layers:
            routed = [layer in config.routed_layers for layer in range(config.num_hidden_layers)]
            changes |= routed_config(routed, thresholds=config.thresholds)
        save_checkpoint(
            tensors, folder, save_companions=self._checkpoint.save_companions, config_changes=changes, overwrite=True
        )


def saved_model(folder: Path) -> LlamaDloForCausalLM:
    """A model that `BaseModel.save` wrote."""
    with open_checkpoint(folder) as checkpoint:
        return llama_dlo_from_tensors(checkpoint.config.raw, checkpoint.tensors)


def deeper(layers: int) -> int:
    """Layers of the deepened models: a fifth more, as DLO and LLaMA-Pro add a quarter of 32 and TLI's K = 5 a fifth."""
    return layers + max(1, layers // 5)


def expansions(layers: int, every: tuple[int, ...]) -> dict[str, ExpansionPlan]:
    """Every way to deepen a model, by its name in the tables.

    Args:
        layers: Of the model.
        every: K of Transformer Layer Injection.
    """
    target = deeper(layers)
    plans = {
        f"interleave {init}": placements("interleave", layers, target_layers=target, init=init)
        for init in ("zero_out", "copy", "random", "linear", "slerp")
    }
    plans["llama-pro"] = placements("llama-pro", layers, groups=target - layers)
    # As deep as the others, and as deep as SOLAR's recipe makes it, which leaves out a quarter at the seam.
    plans["dus, as deep"] = dus_plan(layers)
    plans["dus, a quarter"] = placements("dus", layers, overlap=layers // 4)
    for distance in (distance for distance in every if distance <= layers):
        for source, init in _TLI_VARIANTS:
            name = f"tli every {distance}, {source} {init}"
            plans[name] = placements("tli", layers, every=distance, source=source, init=init)
        # Where K divides the layers, the last new layer is made of the model's last: what that alone costs.
        if (offset := distance // 2) and offset + distance <= layers:
            name = f"tli every {distance} from {offset}, prev copy"
            plans[name] = placements("tli", layers, every=distance, offset=offset, init="copy")
    plans["the last layer twice"] = placements("tli", layers, every=layers, init="copy")
    return plans


def dus_plan(layers: int) -> ExpansionPlan:
    """Depth up-scaling to the depth of the other methods, or one layer more where that is odd."""
    return placements("dus", layers, overlap=(2 * layers - deeper(layers)) // 2)


def mixtures() -> dict[str, MakeModel]:
    """Ways to widen a model."""

    def widened(renormalise: bool) -> MakeModel:
        def make(base: BaseModel) -> LlamaDloForCausalLM:
            model = base.model()
            upcycle(model, experts=_EXPERTS, chosen=_CHOSEN, renormalise=renormalise, seed=0)
            model.eval()
            return model

        return make

    name = f"moe, {_CHOSEN} of {_EXPERTS}"
    return {name: widened(True), f"{name}, not renormalised": widened(False)}
