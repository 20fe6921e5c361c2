"""A tiny foreign graph as a protobuf, to be changed and exported, and what its artefact must compute."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file

from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from tests.bare_session import BareSession, left_padded
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter
from tests.graph_passes.numpy_llama import NumpyLlama, Routing


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A folder with `model.onnx`, its `weights`, config.json and the checkpoint, and an adapter beside it."""

    folder: Path
    adapter: Path

    @classmethod
    def saved(cls, root: Path) -> Foreign:
        """Writes all of it, in fp32."""
        graph = save_foreign_graph(root / "foreign", "fp32", layers=2)
        return cls(graph.parent, save_routed_adapter(graph, root / "adapter"))

    def changed(self, folder: Path, change: Callable[[onnx.ModelProto, Path], object]) -> Path:
        """A copy in a new folder, its graph changed; `change` may write beside it."""
        shutil.copytree(self.folder, folder)
        path = folder / "model.onnx"
        proto = onnx.load(path, load_external_data=False)
        change(proto, folder)
        path.write_bytes(proto.SerializeToString())
        return path

    def export(self, graph: Path, output: Path, **options: object) -> Path:
        """Its artefact, without parity unless asked for: what it computes is compared by `check_logits`."""
        request = ExportRequest(str(graph), output, **{"adapter": self.adapter, "parity": False, **options})
        export_model(request, Reporter())
        return output

    def check_logits(self, artefact: Path) -> None:
        """Compares with an independent Llama, on a batch with left padding, in two steps."""
        rng = np.random.default_rng(1)
        config = json.loads((self.folder / "config.json").read_text())
        batch = left_padded([rng.integers(0, config["vocab_size"], (1, length)) for length in (7, 5)])
        expected = self._model(config).run(*batch, self._routing())
        found = BareSession(artefact / "model.onnx").logits_of(*batch, cuts=[4, 7])
        real = batch[1].astype(bool)
        np.testing.assert_allclose(found[real], expected.logits[real], rtol=0, atol=2e-5)

    def _model(self, config: dict) -> NumpyLlama:
        weights = load_file(self.folder / "checkpoint" / "model.safetensors")
        layers = config["num_hidden_layers"]
        # The adapter injects a layer after each, so that layer i moves to 2i.
        deepened = {
            ".".join([*name.split(".")[:2], str(2 * int(name.split(".")[2])), *name.split(".")[3:]])
            if name.startswith("model.layers.")
            else name: array
            for name, array in weights.items()
        }
        return NumpyLlama(
            {**deepened, **load_file(self.adapter / "adapter.safetensors")},
            2 * layers,
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["rms_norm_eps"],
        )

    def _routing(self) -> Routing:
        tensors = load_file(self.adapter / "adapter.safetensors")
        rule = json.loads((self.adapter / "adapter_config.json").read_text())
        routers = {int(name.split(".")[2]): array for name, array in tensors.items() if ".routers." in name}
        return Routing(routers, rule["rescale_hidden_states"], rule["scale_factor"], rule["scale_gap"])


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The initializer of this name."""
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def reference_of(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where an external tensor lies."""
    return {entry.key: entry.value for entry in tensor.external_data}


def refer(tensor: onnx.TensorProto, **changes: str | None) -> None:
    """Changes where an external tensor lies; None leaves a key out."""
    entries = {**reference_of(tensor), **changes}
    del tensor.external_data[:]
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)


def fuse_skip_norms(proto: onnx.ModelProto, _: Path | None = None) -> None:
    """As onnxruntime-genai's builder and mobius write: every addition but the last with the norm behind it."""
    nodes = proto.graph.node
    norms = [node for node in nodes if node.op_type == "RMSNormalization"]
    for norm in norms[1:]:
        (add,) = [node for node in nodes if norm.input[0] in node.output]
        assert add.op_type == "Add"
        fused = onnx.helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [*add.input, norm.input[1]],
            [norm.output[0], "", "", add.output[0]],
            name=f"{norm.name}.skip",
            domain="com.microsoft",
            epsilon=onnx.helper.get_node_attr_value(norm, "epsilon"),
        )
        at = list(nodes).index(norm)
        nodes.insert(at, fused)
        nodes.remove(add)
        nodes.remove(norm)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def leave_later_tokens_to_attention(proto: onnx.ModelProto, _: Path | None = None) -> None:
    """As mobius writes it: the operator is causal by itself, its mask says in bool what is padding."""
    made = [
        onnx.helper.make_node("Cast", ["attention_mask"], ["real"], to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("Unsqueeze", ["real", "heads_and_queries"], ["row"]),
        onnx.helper.make_node("Shape", ["input_ids"], ["queries"], start=1, end=2),
        onnx.helper.make_node("Shape", ["attention_mask"], ["keys"], start=1, end=2),
        onnx.helper.make_node("Concat", ["ones", "queries", "keys"], ["mask_shape"], axis=0),
        onnx.helper.make_node("Expand", ["row", "mask_shape"], ["padding"]),
    ]
    for name, values in (("heads_and_queries", [1, 2]), ("ones", [1, 1])):
        proto.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [2], values))
    nodes = [*made, *proto.graph.node]
    for node in nodes:
        if node.op_type == "Attention":
            node.input[3] = "padding"
            node.attribute.append(onnx.helper.make_attribute("is_causal", 1))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
