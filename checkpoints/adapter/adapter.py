"""The DLO adapter: injected layers and routers of a deepened model, apart from its base checkpoint.

A folder of two files. ``adapter_config.json`` says which layers are new and which are routed, indices counted in the
deepened model; ``adapter.safetensors`` holds ``model.layers.{new}.…`` of the injected layers and
``model.routers.{layer}.weight`` [1, hidden]. Needs NumPy and safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dlo_export.checkpoints.adapter.checks import CONFIG_FIELDS, config_problems, tensor_problems
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.lazy_tensors import LazyTensor, Progress, SafetensorsTensor, save_safetensors

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter.safetensors"

_LAYER_TENSOR_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class AdapterError(InputError):
    """An adapter is missing, corrupt, inconsistent, or made for another model."""


@dataclass(frozen=True)
class InjectedLayer:
    """A layer that was added to a trained model.

    Attributes:
        position: Its index in the deepened model.
        source: The layer of the base model it derives from.
        init: How its weights were made, see `dlo_export.checkpoints.depth.layer_init.LAYER_INITS`.
    """

    position: int
    source: int
    init: str


@dataclass(frozen=True)
class DloAdapter:
    """What turns a plain Llama into a deepened and routed one.

    Attributes:
        routing: What a router decides about: the layer's MLP, or the whole layer.
        is_dlo: For every layer of the deepened model, whether it is routed.
        rescale_hidden_states: Whether the routed branch is multiplied by 0.5·scale_factor + (score − 0.5)·scale_gap.
        scale_factor: See above.
        scale_gap: See above.
        injected_layers: The new layers, by rising position.
        base_sha256: Hash of the base checkpoint the adapter was made from, where known.
        tensors: Names and tensors of the injected layers and routers, in checkpoint shapes ([out, in]).
    """

    routing: Literal["mlp", "layer"]
    is_dlo: tuple[bool, ...]
    rescale_hidden_states: bool = False
    scale_factor: float = 2.0
    scale_gap: float = 0.0
    injected_layers: tuple[InjectedLayer, ...] = ()
    base_sha256: str | None = None
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the deepened model."""
        return len(self.is_dlo)

    @property
    def num_base_layers(self) -> int:
        """Layers of the model the adapter goes on."""
        return len(self.is_dlo) - len(self.injected_layers)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of the routed layers in the deepened model."""
        return tuple(layer for layer, routed in enumerate(self.is_dlo) if routed)

    def router(self, layer: int) -> np.ndarray:
        """Reads a routed layer's router, float32 [1, hidden]."""
        return self.tensors[f"model.routers.{layer}.weight"].numpy().astype(np.float32)

    def layer_tensors(self, position: int) -> dict[str, LazyTensor]:
        """The tensors of one injected layer by role, for example ``self_attn.q_proj.weight``."""
        prefix = f"model.layers.{position}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def check_fits(self, tensor_shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> None:
        """Checks the adapter against the model it is to go on.

        Args:
            tensor_shapes: Shapes of the base checkpoint's tensors by name.
            num_layers: Layers of the base model.

        Raises:
            AdapterError: Another number of layers, or tensors of other shapes.
        """
        problems = []
        if num_layers != self.num_base_layers:
            problems.append(f"the model has {num_layers} layers, the adapter goes on {self.num_base_layers}")
        hidden = tensor_shapes.get("model.layers.0.input_layernorm.weight")
        for name, tensor in self.tensors.items():
            layer = _LAYER_TENSOR_NAME.fullmatch(name)
            expected = tensor_shapes.get(f"model.layers.0.{layer[2]}") if layer else hidden and (1, *hidden)
            if expected != tensor.shape:
                found = f"found {list(tensor.shape)}"
                problems.append(f"{name}: {found}, the model needs {list(expected) if expected else 'no such tensor'}")
        _raise_for("adapter does not fit the model", problems, "use the checkpoint the adapter was made from")


def load_adapter(folder: str | Path) -> DloAdapter:
    """Opens an adapter; values are read when asked for, except the routers, which are checked to be finite.

    Raises:
        AdapterError: A file is missing or corrupt, a field or shape is wrong, or the two files disagree. All problems
            found are listed.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_NAME, TENSORS_NAME) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"adapter {folder}: {' and '.join(missing)} not found"
            f"\n\nhint: an adapter is a folder with {CONFIG_NAME} and {TENSORS_NAME}"
        )
    return _adapter_from_config(_read_config(folder / CONFIG_NAME), _open_tensors(folder / TENSORS_NAME), folder)


def save_adapter(
    adapter: DloAdapter, folder: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Writes an adapter, whole or not at all.

    Args:
        adapter: Checked as `load_adapter` would.
        folder: The folder to make.
        overwrite: Replace a folder that holds something.
        progress: Called with the bytes written and their total.

    Raises:
        AdapterError: The adapter is inconsistent.
        FolderExistsError: The folder is not empty and `overwrite` is not set.
    """
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base_sha256": adapter.base_sha256,
        "routing": adapter.routing,
        "is_dlo": list(adapter.is_dlo),
        "rescale_hidden_states": adapter.rescale_hidden_states,
        "scale_factor": adapter.scale_factor,
        "scale_gap": adapter.scale_gap,
        "injected_layers": [asdict(layer) for layer in adapter.injected_layers],
    }
    _adapter_from_config(config, adapter.tensors, Path(folder))
    with whole_folder(Path(folder), overwrite=overwrite) as staging:
        save_safetensors(adapter.tensors, staging / TENSORS_NAME, progress=progress)
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise AdapterError(
            f"adapter {path}: not JSON: {err}\n\nhint: the file is corrupt; make the adapter anew"
        ) from err
    if not isinstance(config, dict):
        raise AdapterError(
            f"adapter {path}: found a JSON {type(config).__name__}, expected an object\n\nhint: make the adapter anew"
        )
    return config


def _open_tensors(path: Path) -> dict[str, LazyTensor]:
    try:
        file: Any = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as err:
        raise AdapterError(f"adapter {path}: {err}\n\nhint: the file is truncated or corrupt; copy it again") from err
    tensors: dict[str, LazyTensor] = {}
    problems = []
    for name in file.keys():  # noqa: SIM118 (not a mapping)
        entry = file.get_slice(name)
        if entry.get_dtype() not in _DTYPES:
            problems.append(f"{name}: found dtype {entry.get_dtype()}, expected one of {', '.join(_DTYPES)}")
            continue
        tensors[name] = SafetensorsTensor(file, name, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
    _raise_for(f"adapter {path}", problems, "adapters hold weights in 32 or 16 bits")
    return tensors


def _adapter_from_config(config: dict[str, Any], tensors: Mapping[str, LazyTensor], origin: Path) -> DloAdapter:
    """Builds the adapter from its JSON, checking every field and that the tensors are the ones it announces.

    Raises:
        AdapterError: With all the problems found.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"adapter {origin}: format_version is {version!r}, expected {FORMAT_VERSION}"
            "\n\nhint: the adapter was made by another version of dlo-export"
        )
    _raise_for(f"adapter {origin}", config_problems(config), f"the fields are {', '.join(CONFIG_FIELDS)}")
    adapter = DloAdapter(
        routing=config["routing"],
        is_dlo=tuple(config["is_dlo"]),
        rescale_hidden_states=config["rescale_hidden_states"],
        scale_factor=float(config["scale_factor"]),
        scale_gap=float(config["scale_gap"]),
        injected_layers=tuple(InjectedLayer(**entry) for entry in config["injected_layers"]),
        base_sha256=config.get("base_sha256"),
        tensors=tensors,
    )
    positions = [layer.position for layer in adapter.injected_layers]
    problems = tensor_problems(tensors, adapter.routed_layers, positions)
    _raise_for(f"adapter {origin}", problems, f"{CONFIG_NAME} and {TENSORS_NAME} must describe the same layers")
    return adapter


def _raise_for(subject: str, problems: list[str], hint: str) -> None:
    if problems:
        details = problems[0] if len(problems) == 1 else "\n  - ".join([f"{len(problems)} problems", *problems])
        raise AdapterError(f"{subject}: {details}\n\nhint: {hint}")
