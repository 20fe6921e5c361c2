"""What is wrong with an adapter: its configuration, its tensors, and whether the two agree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from dlo_export.checkpoints.depth.layer_init import LayerInitError, canonical_init
from dlo_export.checkpoints.files.json_fields import is_number
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import (
    MAX_LAYERS,
    LayerTable,
    layer_tensor_name,
    parse_layer_tensor,
    parse_router,
    router_name,
    table_of,
)
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.checkpoints.router_thresholds import threshold_problems

CONFIG_FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "base_sha256": (str, type(None)),
    "routing": (str,),
    "is_dlo": (list,),
    "rescale_hidden_states": (bool,),
    "scale_factor": (int, float),
    "scale_gap": (int, float),
    "injected_layers": (list,),
    THRESHOLDS: (dict,),
}
_OPTIONAL_FIELDS = {"base_sha256", THRESHOLDS}


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Fields of an ``adapter_config.json`` that are missing, unknown, or of the wrong type or value."""
    problems = [f"{key} is missing" for key in CONFIG_FIELDS if key not in config and key not in _OPTIONAL_FIELDS]
    problems += [f"{key} is not a field of an adapter" for key in config if key not in CONFIG_FIELDS]
    for key, types in CONFIG_FIELDS.items():
        value = config.get(key)
        # bool is an int to Python, but not to whoever wrote the file.
        if key in config and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            problems.append(f"{key} is {value!r}, expected {' or '.join(t.__name__ for t in types)}")
    if problems:
        return problems

    if config["routing"] not in get_args(RoutingKind):
        kinds = " or ".join(f'"{kind}"' for kind in get_args(RoutingKind))
        problems.append(f"routing is {config['routing']!r}, expected {kinds}")
    if not config["is_dlo"] or not all(isinstance(routed, bool) for routed in config["is_dlo"]):
        problems.append(f"is_dlo is {config['is_dlo']!r}, expected true or false for every layer")
    if len(config["is_dlo"]) > MAX_LAYERS:
        problems.append(f"is_dlo has {len(config['is_dlo'])} entries, expected at most {MAX_LAYERS} layers")
        return problems
    problems += [
        f"{key} is {config[key]!r}, expected a finite number"
        for key in ("scale_factor", "scale_gap")
        if not is_number(config[key])
    ]
    sha256 = config.get("base_sha256")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        problems.append(f"base_sha256 is {sha256!r}, expected 64 hexadecimal digits")
    problems += threshold_problems(config.get(THRESHOLDS), [i for i, routed in enumerate(config["is_dlo"]) if routed])
    entries, num_layers = config["injected_layers"], len(config["is_dlo"])
    if len(entries) >= num_layers:
        return [*problems, f"injected_layers has {len(entries)} entries, expected fewer than the {num_layers} layers"]
    return problems + injected_layer_problems(entries, num_layers, num_layers - len(entries))


def tensor_problems(
    tensors: Mapping[str, LazyTensor], routed_layers: Sequence[int], injected_positions: Sequence[int]
) -> list[str]:
    """Tensors that are missing or unexpected, shapes that contradict each other, routers that are not finite."""
    routers = {router_name(layer) for layer in routed_layers}
    # An adapter does not name its model's family: what its layers hold tells it.
    table = table_of(place.tensor for place in map(parse_layer_tensor, tensors) if place is not None)
    required = routers | {layer_tensor_name(layer, n) for layer in injected_positions for n in table.required}
    allowed = required | {layer_tensor_name(layer, n) for layer in injected_positions for n in table.axes}
    problems = [f"{name} is missing" for name in sorted(required - tensors.keys())]
    problems += [
        f"{name} is unexpected: that layer is not {'injected' if parse_router(name) is None else 'routed'}"
        for name in sorted(tensors.keys() - allowed)
    ]
    known = {name: tensor for name, tensor in tensors.items() if name in allowed}
    problems += _shape_problems({name: tensor.shape for name, tensor in known.items()}, table)
    problems += [
        f"{name} holds values that are not finite"
        for name in sorted(routers & known.keys())
        if not np.isfinite(known[name].numpy().astype(np.float32)).all()
    ]
    return problems


def injected_layer_problems(entries: Sequence[Any], num_layers: int, num_base_layers: int) -> list[str]:
    """What is wrong with the `injected_layers` of an adapter, or of a deepened checkpoint's config.json.

    Args:
        entries: As read.
        num_layers: Of the deepened model.
        num_base_layers: At most, of the model that was there first: sources are counted in that.
    """
    problems, positions = [], []
    limits = {"position": num_layers, "source": num_base_layers}
    for index, entry in enumerate(entries):
        place = f"injected_layers[{index}]"
        if not isinstance(entry, dict) or set(entry) != {"position", "source", "init"}:
            problems.append(f"{place} is {entry!r}, expected an object with position, source and init")
            continue
        problems += [
            f"{place}.{key} is {entry[key]!r}, expected an integer from 0 to {limit - 1}"
            for key, limit in limits.items()
            if type(entry[key]) is not int or not 0 <= entry[key] < limit
        ]
        positions.append(entry["position"])
        try:
            canonical_init(entry["init"])
        except LayerInitError as err:
            problems.append(f"{place}.init: {err.message}")
    if not problems and positions != sorted(set(positions)):
        problems.append(f"injected_layers are at {positions}, expected rising positions")
    return problems


def _shape_problems(shapes: Mapping[str, tuple[int, ...]], table: LayerTable) -> list[str]:
    """Shapes that contradict each other: every tensor is measured against the first of its kind."""
    sizes: dict[str, tuple[int, str]] = {}
    problems = []
    for name, shape in shapes.items():
        axes = _axes(name, table)
        if len(shape) != len(axes) or (axes[0] == "1" and shape[0] != 1):
            problems.append(f"{name} has shape {list(shape)}, expected [{', '.join(axes)}]")
            continue
        for axis, size in zip(axes, shape, strict=True):
            first_size, first_name = sizes.setdefault(axis, (size, name))
            if size != first_size:
                problems.append(f"{name} has {axis} size {size}, but {first_name} has {first_size}")
    return problems


def _axes(name: str, table: LayerTable) -> tuple[str, ...]:
    """Names of a tensor's axes, in checkpoint orientation."""
    place = parse_layer_tensor(name)
    return ("1", "hidden") if place is None else table.axes[place.tensor]
