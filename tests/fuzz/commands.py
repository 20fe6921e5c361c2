"""Models and artefacts of every kind that is read, what is damaged of each, and the commands that read it then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx

from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.artefact.description import FILE_NAME, MODEL_NAME, WEIGHTS_NAME, content_sha256
from dlo_export.runtimes.artefact.files import describe_file
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter
from tests.fuzz.mutations import (
    damage_bytes,
    damage_floats,
    damage_gguf,
    damage_json,
    damage_onnx,
    damage_place,
    damage_safetensors,
)
from tests.genai_graphs import save_genai_graph
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama
from tests.tiny_sentencepiece import train_sentencepiece

Damage = Callable[[Random, Path], str]

SIZES = {"layers": 2, "hidden": 16, "intermediate": 24, "heads": 2, "kv_heads": 1}
TEXT = ("--text", "text", "--tokens", "512", "--evaluation-tokens", "512")
# The folders a case of each kind works on, and how often which file of them is damaged.
KINDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, Damage], ...]]] = {
    "weights": (("routed", "text"), (("routed/model.safetensors", damage_safetensors),)),
    "configuration": (
        ("routed", "sharded", "pieces", "text"),
        (
            ("pieces/tokenizer.model", damage_bytes),
            *(("routed/config.json", damage_json),) * 6,
            ("routed/generation_config.json", damage_json),
            ("routed/tokenizer.json", damage_json),
            ("routed/tokenizer_config.json", damage_json),
            ("sharded/model.safetensors.index.json", damage_json),
        ),
    ),
    "gguf": (
        ("gguf",),
        tuple((f"gguf/{name}.gguf", damage_gguf) for name in ("model", "model", "quantised", "parts-00002-of-00002")),
    ),
    "adapter": (
        ("dense", "adapter"),
        (
            *(("adapter/adapter_config.json", damage_json),) * 2,
            ("adapter/adapter.safetensors", damage_safetensors),
        ),
    ),
    "graph": (("graph", "adapter"), (*(("graph/model.onnx", damage_onnx),) * 6, ("graph/config.json", damage_json))),
    # Packed, fused, quantised: what other exporters make for a runtime.
    "packed graph": (
        ("packed", "packed_adapter"),
        (*(("packed/graph/model.onnx", damage_onnx),) * 6, ("packed/graph/genai_config.json", damage_json)),
    ),
    "description": (("routed", "artefact", "text"), ((f"artefact/{FILE_NAME}", damage_json),)),
    "artefact": (
        ("routed", "artefact", "text"),
        (
            *((f"artefact/{MODEL_NAME}", damage_onnx),) * 4,
            (f"artefact/{WEIGHTS_NAME}", damage_floats),
            ("artefact/tokenizer.json", damage_json),
            ("artefact/tokenizer_config.json", damage_json),
            ("artefact/generation_config.json", damage_json),
            ("artefact/config.json", damage_json),
        ),
    ),
    "place": (
        ("routed", "sharded", "gguf", "dense", "adapter", "graph", "artefact", "text"),
        tuple(
            (name, damage_place)
            for name in (
                *("routed/config.json", "routed/model.safetensors", "routed/tokenizer.json", "text/0.txt"),
                *("routed/generation_config.json", "sharded/model.safetensors.index.json", "gguf/model.gguf"),
                *("adapter/adapter_config.json", "adapter/adapter.safetensors", "graph/model.onnx", "graph/weights"),
                *("graph/config.json", f"artefact/{FILE_NAME}", f"artefact/{MODEL_NAME}", "artefact/model.onnx.data"),
                *("artefact/tokenizer.json", "artefact/generation_config.json", "artefact/tokenizer_config.json"),
            )
        ),
    ),
}


def save_originals(folder: Path) -> None:
    """Writes the folders that KINDS names: whole ones, tiny."""
    routed = save_tiny_llama(
        folder / "routed",
        **SIZES,
        routed=(True, False),
        thresholds={0: 0.4},
        tokenizer=True,
        vocab=BYTE_VOCABULARY,
        legacy_keys=True,
    )
    save_tiny_llama(folder / "sharded", **SIZES, shards=2)
    dense = save_tiny_llama(folder / "dense", layers=2, vocab=290)  # as the graph, which the adapter is made for
    (folder / "gguf").mkdir()
    save_tiny_gguf(dense, folder / "gguf" / "model.gguf", tokenizer="llama-bpe")
    save_tiny_gguf(dense, folder / "gguf" / "parts.gguf", tensors_per_part=12)
    wide = save_tiny_llama(folder / "wide", **(SIZES | {"hidden": 32, "intermediate": 32}))
    save_tiny_gguf(wide, folder / "gguf" / "quantised.gguf", "Q8_0")
    pieces = save_tiny_llama(folder / "pieces", **SIZES, vocab=600)
    train_sentencepiece(pieces)
    graph = save_foreign_graph(folder / "graph", "fp32", layers=2)
    model = onnx.load(graph, load_external_data=False)
    model.producer_name = "pytorch"
    onnx.save(model, graph)
    save_routed_adapter(graph, folder / "adapter")
    packed = save_genai_graph(folder / "packed", "int4, zero points", layers=2)
    save_routed_adapter(packed, folder / "packed_adapter")
    export_model(ExportRequest(str(routed), folder / "artefact"), Reporter())
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"One text of some words, number {number}. " * 40)


def command(random: Random, damaged: str) -> list[str]:
    """Arguments of a command that reads the damaged file, in the folder of its case; what it writes goes to out/."""
    # Parity and calibration run PyTorch, which takes longer than all else.
    slow = random.random() < 0.1
    lowering = random.choice(("auto", "masked", "if", "compact"))
    export = ["export", "-o", "out/new", "--lowering", lowering, *(() if slow else ("--no-parity",))]
    expand = ["expand", "-o", "out/new", "--every", "1", *random.choice(((), ("--adapter",)))]
    calibrate = ["calibrate", "-o", "out/new", *TEXT, *random.choice(((), ("--retarget", "0.8")))]
    verify = random.choice(((), ("--verify",)))
    run = ["run", "artefact", "Hello", "-n", "3", *random.choice(((), ("--raw",))), *verify]
    inspect = ["inspect", "artefact", *random.choice(((), ("--json",)))]
    evaluate = ["evaluate", "--text", "text", "--limit", "2", "--json"]
    few = ["--rounds", "1", "--prompt-tokens", "4", "--decode-tokens", "2", "--text", "text", "--json"]
    place = damaged.split("/", maxsplit=1)[0]
    checkpoint = place if place != "gguf" else damaged.replace("00002-of", "00001-of")
    quick: dict[str, tuple[list[str], ...]] = {
        "text": ([*calibrate, "routed"],),
        "adapter": ([*export, "dense", "--adapter", "adapter"],),
        "graph": ([*export, "graph/model.onnx", "--adapter", "adapter"],) * 2 + (["inspect", "graph/model.onnx"],),
        "packed": (
            *([*export, "packed/graph/model.onnx", "--adapter", "packed_adapter"],) * 2,
            ["inspect", "packed/graph/model.onnx"],
        ),
        "artefact": (run, inspect, [*evaluate, "artefact"]),
    }
    if slow and place == "artefact":
        return random.choice((["bench", "artefact", *few, *verify], ["parity", "artefact", "routed"]))
    if slow and place in ("routed", "sharded") and random.random() < 0.5:
        return random.choice(([*calibrate, checkpoint], [*evaluate, checkpoint]))
    return random.choice(quick.get(place, ([*export, checkpoint], [*export, checkpoint], [*expand, checkpoint])))


def vouch_for(path: Path) -> None:
    """Makes an artefact's description say of a damaged file that it is the right one, so that it is read at all."""
    description = path.parent / FILE_NAME
    if path.name == FILE_NAME:
        try:
            values = json.loads(description.read_text())
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(values, dict):
            values["content_sha256"] = content_sha256(values)
            description.write_text(json.dumps(values))
    elif path.name in (MODEL_NAME, WEIGHTS_NAME) and description.exists():
        values = json.loads(description.read_text())
        described = describe_file(path)
        for entry in values["files"]:
            if entry["name"] == path.name:
                entry |= {"bytes": described.bytes, "sha256": described.sha256}
        values["content_sha256"] = content_sha256(values)
        description.write_text(json.dumps(values))
