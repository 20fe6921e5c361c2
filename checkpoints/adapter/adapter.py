"""The DLO adapter: injected layers and routers of a deepened model, apart from its base checkpoint.

A folder of two files. ``adapter_config.json`` says which layers are new and which are routed, indices counted in the
deepened model; ``adapter.safetensors`` holds ``model.layers.{new}.…`` of the injected layers and
``model.routers.{layer}.weight`` [1, hidden]. Where the base's weights were trained along with the routers, ``lora/`` is
the LoRA adapter that does to them what training did, as PEFT saves it (see `dlo_export.checkpoints.adapter.lora`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.checkpoints.adapter.checks import CONFIG_FIELDS, config_problems, tensor_problems
from dlo_export.checkpoints.dtypes import BY_NUMPY, FLOATS
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.files.disk_space import no_room_reported
from dlo_export.checkpoints.files.file_inside import file_inside
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.files.written_files import ADAPTER_FILE
from dlo_export.checkpoints.formats.safetensors_reader import tensors_of_safetensors
from dlo_export.checkpoints.formats.safetensors_writer import save_safetensors
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import FINAL_NORM, layer_tensor_name, parse_layer_tensor, router_name
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.checkpoints.router_thresholds import read_thresholds, thresholds_json

# Format 2 has thresholds, which a reader of format 1 would not look for; what has none is written as format 1.
FORMAT_VERSION, THRESHOLDS_FORMAT_VERSION = 1, 2
CONFIG_NAME = ADAPTER_FILE
TENSORS_NAME = "adapter.safetensors"
LORA_FOLDER = "lora"


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
        routing: What a router decides about: the layer's MLP, its attention, or the whole layer.
        is_dlo: For every layer of the deepened model, whether it is routed.
        rescale_hidden_states: Whether the routed branch is multiplied by 0.5·scale_factor + (score − 0.5)·scale_gap.
        scale_factor: Of that multiplier.
        scale_gap: Of that multiplier.
        router_thresholds: By routed layer, the score a token must exceed to be active, where it is not 0.5.
        injected_layers: The new layers, by rising position.
        base_sha256: Hash of the base checkpoint the adapter was made from, where known.
        tensors: Names and tensors of the injected layers and routers, in checkpoint shapes ([out, in]).
    """

    routing: RoutingKind
    is_dlo: tuple[bool, ...]
    rescale_hidden_states: bool = False
    scale_factor: float = 2.0
    scale_gap: float = 0.0
    router_thresholds: Mapping[int, float] = field(default_factory=dict)
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
        return self.tensors[router_name(layer)].numpy().astype(np.float32)

    def layer_tensors(self, position: int) -> dict[str, LazyTensor]:
        """The tensors of one injected layer by their names inside it, for example ``self_attn.q_proj.weight``."""
        prefix = layer_tensor_name(position, "")
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
        hidden = tensor_shapes.get(FINAL_NORM)
        for name, tensor in self.tensors.items():
            place = parse_layer_tensor(name)
            expected = tensor_shapes.get(layer_tensor_name(0, place.tensor)) if place else hidden and (1, *hidden)
            if expected != tensor.shape:
                found = f"found {list(tensor.shape)}"
                problems.append(f"{name}: {found}, the model needs {list(expected) if expected else 'no such tensor'}")
        _raise_for("adapter does not fit the model", problems, "use the checkpoint the adapter was made from")


def load_adapter(folder: str | Path) -> DloAdapter:
    """Opens an adapter; values are read when asked for, except the routers, which are checked to be finite.

    Raises:
        AdapterError: A file is missing or corrupt, a field or shape is wrong, or the two files disagree. All problems
            found are listed.
        CheckpointError: A file is a link that leads out of the folder.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_NAME, TENSORS_NAME) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            f"adapter {folder}: {' and '.join(missing)} not found",
            hint=f"an adapter is a folder with {CONFIG_NAME} and {TENSORS_NAME}",
        )
    for name in (CONFIG_NAME, TENSORS_NAME):
        file_inside(folder, name)
    config = read_json(folder / CONFIG_NAME, AdapterError)
    return _adapter_from_config(config, _open_tensors(folder / TENSORS_NAME), folder)


def save_adapter(
    adapter: DloAdapter,
    folder: str | Path,
    *,
    overwrite: bool = False,
    save_companions: Callable[[Path], None] = lambda _folder: None,
) -> None:
    """Writes an adapter, whole or not at all.

    Args:
        adapter: Checked as `load_adapter` would.
        folder: The folder to make.
        overwrite: Replace a folder that holds something.
        save_companions: Writes what else belongs into the folder, `LORA_FOLDER` for one.

    Raises:
        AdapterError: The adapter is inconsistent.
        FolderExistsError: The folder is not empty and `overwrite` is not set.
        MachineError: The disk is full.
    """
    config: dict[str, Any] = {
        "format_version": THRESHOLDS_FORMAT_VERSION if adapter.router_thresholds else FORMAT_VERSION,
        "base_sha256": adapter.base_sha256,
        "routing": adapter.routing,
        "is_dlo": list(adapter.is_dlo),
        "rescale_hidden_states": adapter.rescale_hidden_states,
        "scale_factor": adapter.scale_factor,
        "scale_gap": adapter.scale_gap,
        "injected_layers": [asdict(layer) for layer in adapter.injected_layers],
        **({THRESHOLDS: thresholds_json(adapter.router_thresholds)} if adapter.router_thresholds else {}),
    }
    _adapter_from_config(config, adapter.tensors, Path(folder))
    with no_room_reported(Path(folder)), whole_folder(Path(folder), overwrite=overwrite) as staging:
        save_safetensors(adapter.tensors, staging / TENSORS_NAME)
        save_json(staging / CONFIG_NAME, config)
        save_companions(staging)


def _open_tensors(path: Path) -> dict[str, LazyTensor]:
    try:
        tensors = tensors_of_safetensors(MappedFile(path))
    except CheckpointError as err:
        raise AdapterError(err.message, hint=err.hint) from err
    problems = [
        f"{name}: found dtype {tensor.dtype.name}, expected one of {', '.join(kind.name for kind in FLOATS)}"
        for name, tensor in tensors.items()
        if BY_NUMPY[tensor.dtype] not in FLOATS
    ]
    _raise_for(f"adapter {path}", problems, "adapters hold weights in 32 or 16 bits")
    return dict(tensors)


def _adapter_from_config(config: dict[str, Any], tensors: Mapping[str, LazyTensor], origin: Path) -> DloAdapter:
    """Builds the adapter from its JSON, checking every field and that the tensors are the ones it announces.

    Raises:
        AdapterError: With all the problems found.
    """
    version, known = config.get("format_version"), (FORMAT_VERSION, THRESHOLDS_FORMAT_VERSION)
    if type(version) is not int or version not in known:
        raise AdapterError(
            f"adapter {origin}: format_version is {version!r}, expected {' or '.join(map(str, known))}",
            hint="the adapter was made by another version of dlo-export",
        )
    if version == FORMAT_VERSION and THRESHOLDS in config:
        raise AdapterError(
            f"adapter {origin}: format_version is {version}, but {THRESHOLDS} are of format "
            f"{THRESHOLDS_FORMAT_VERSION}",
            hint="a reader of format 1 would ignore them: say format_version 2, or remove them",
        )
    _raise_for(f"adapter {origin}", config_problems(config), f"the fields are {', '.join(CONFIG_FIELDS)}")
    adapter = DloAdapter(
        routing=config["routing"],
        is_dlo=tuple(config["is_dlo"]),
        rescale_hidden_states=config["rescale_hidden_states"],
        scale_factor=float(config["scale_factor"]),
        scale_gap=float(config["scale_gap"]),
        router_thresholds=read_thresholds(config.get(THRESHOLDS)),
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
        raise AdapterError(f"{subject}: {details}", hint=hint)
