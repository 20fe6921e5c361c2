"""The plain decoder of a Llama, or of a family near it, as an ONNX graph in standard operators.

Interface: DESIGN's, the one optimum and onnxruntime-genai use. Inputs `input_ids` [batch, sequence], `attention_mask`
[batch, past + sequence], `position_ids` [batch, sequence] (int64) and `past_key_values.{i}.key|value` [batch, kv_heads,
past, head_dim]; outputs `logits` [batch, sequence, vocab] and `present.{i}.key|value`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.interface import (
    ATTENTION_MASK,
    CACHE_PARTS,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    past_name,
    present_name,
)
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import EMBEDDING, Block, layer_path, layer_tensor_name
from dlo_export.exporter.plain_graph.graph_builder import GraphBuilder
from dlo_export.exporter.plain_graph.rotary import rotary_tables
from dlo_export.graph_passes.checkpoint_weight import CheckpointWeight

OPSET = 23  # Attention, RMSNormalization and RotaryEmbedding
IR_VERSION = 11


def plain_graph(
    config: LlamaConfig, tensors: Mapping[str, LazyTensor], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Model:
    """Builds the decoder without injected layers' or routers' semantics; routers of the configuration are ignored.

    Args:
        config: Of a model with `config.num_layers` layers.
        tensors: Checkpoint tensors under Hugging Face names; read when the model is saved, not here.
        dtype: Of weights, KV cache and logits.

    Returns:
        A model whose weights are lazy. Linear weights are stored [in, out], as MatMul reads them, so that no runtime
        transposes them; a tied head reads the embedding matrix itself through Gemm's transB.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="llama")
    _DecoderGraph(GraphBuilder(graph), config, tensors, dtype).build()
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="dlo-export")


class _DecoderGraph:
    """One build of the graph; the methods follow the order of the computation."""

    def __init__(
        self, builder: GraphBuilder, config: LlamaConfig, tensors: Mapping[str, LazyTensor], dtype: ir.DataType
    ) -> None:
        self.builder = builder
        self.config = config
        self.table = config.family.layer
        self.tensors = tensors
        self.dtype = dtype

    def build(self) -> None:
        builder, config = self.builder, self.config
        input_ids = builder.input(INPUT_IDS, ir.DataType.INT64, ["batch", "sequence"])
        attention_mask = builder.input(ATTENTION_MASK, ir.DataType.INT64, ["batch", "total_sequence"])
        position_ids = builder.input(POSITION_IDS, ir.DataType.INT64, ["batch", "sequence"])
        cache_shape: list[int | str] = ["batch", config.num_kv_heads, "past_sequence", config.head_dim]
        past = [
            [builder.input(past_name(i, part), self.dtype, cache_shape) for part in CACHE_PARTS]
            for i in range(config.num_layers)
        ]

        # What all layers share is computed once per step: the rotary tables, and one additive mask.
        embeddings = self._weight(EMBEDDING)
        hidden_states = builder.op("Gather", [embeddings, input_ids], "model.embed_tokens")
        hidden_states = self._scaled(
            hidden_states, config.multipliers.embedding, "model.embedding_multiplier", "model.scaled_embeddings"
        )
        tables = rotary_tables(builder, config.rope, config.head_dim, position_ids)
        self.rotary = [self._cast(table) for table in tables]
        self.mask = self._attention_bias(input_ids, attention_mask)

        # The residual stream goes through the layers; each gives out its cache as it is after the step.
        present: list[ir.Value] = []
        for i in range(config.num_layers):
            hidden_states, key, value = self._decoder_layer(i, hidden_states, past[i])
            present += [key, value]
        logits = self._head(self._norm(hidden_states, "model.norm"), embeddings)

        builder.output(logits, self.dtype, ["batch", "sequence", config.vocab_size])
        for value in present:
            builder.output(value, self.dtype, ["batch", config.num_kv_heads, "total_sequence", config.head_dim])

    def _attention_bias(self, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
        """One additive mask for all layers, [batch, 1, sequence, total]: causal, and blind to padding.

        What is masked gets the most negative finite number, not -inf: a padding token at the left sees nothing at all,
        and its attention must stay a number, because its keys and values are read (and masked) by the real tokens.
        """
        builder, name = self.builder, "model.attention_mask"
        # A step's queries are the last of all positions: query t of it stands at past + t.
        total = builder.op("Shape", [attention_mask], f"{name}.total", start=1, end=2, dtype=ir.DataType.INT64)
        sequence = builder.op("Shape", [input_ids], f"{name}.sequence", start=1, end=2, dtype=ir.DataType.INT64)
        past = builder.op("Sub", [total, sequence], f"{name}.past")
        first = builder.op("Squeeze", [past], f"{name}.past_scalar")
        last = builder.op("Squeeze", [total], f"{name}.total_scalar")
        zero, one = builder.constant("zero", np.int64(0)), builder.constant("one", np.int64(1))
        key_order = builder.op("Range", [zero, last, one], f"{name}.key_order")
        query_order = builder.op("Range", [first, last, one], f"{name}.query_order")
        query_column = builder.op(
            "Unsqueeze", [query_order, builder.constant("axes.column", np.array([1]))], f"{name}.query_column"
        )
        # Visible is what is no later than the query, and no padding: together [batch, 1, sequence, total].
        causal = builder.op("LessOrEqual", [key_order, query_column], f"{name}.causal", dtype=ir.DataType.BOOL)
        real = builder.op(
            "Unsqueeze",
            [
                builder.op("Cast", [attention_mask], f"{name}.bool", to=ir.DataType.BOOL.value, dtype=ir.DataType.BOOL),
                builder.constant("axes.heads_and_queries", np.array([1, 2])),
            ],
            f"{name}.real",
        )
        visible = builder.op("And", [causal, real], f"{name}.visible")
        numpy_type = self.dtype.numpy()
        lowest = np.asarray(self.dtype.min, numpy_type)
        return builder.op(
            "Where",
            [visible, builder.constant("visible", np.zeros((), numpy_type)), builder.constant("masked", lowest)],
            f"{name}.bias",
            dtype=self.dtype,
        )

    def _decoder_layer(
        self, index: int, hidden_states: ir.Value, past: list[ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One layer; returns the residual stream behind it and the layer's keys and values."""
        builder, name = self.builder, layer_path(index)
        normed = self._block_norm(index, hidden_states, "self_attn", behind=False)
        attended, key, value = self._attention(index, normed, past)
        attended = self._block_norm(index, attended, "self_attn", behind=True)
        attended = self._added(attended, f"{name}.attention_multiplied")
        residual = builder.op("Add", [hidden_states, attended], f"{name}.attention_residual")
        branch = self._mlp(index, self._block_norm(index, residual, "mlp", behind=False))
        branch = self._block_norm(index, branch, "mlp", behind=True)
        branch = self._added(branch, f"{name}.mlp_multiplied")
        return builder.op("Add", [residual, branch], f"{name}.mlp_residual"), key, value

    def _attention(self, index: int, normed: ir.Value, past: list[ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        builder, config, name = self.builder, self.config, layer_tensor_name(index, "self_attn")
        query = self._projection(index, "q_proj", normed)
        key = self._projection(index, "k_proj", normed)
        value = self._projection(index, "v_proj", normed)
        if config.qk_norm:
            query = self._qk_norm(index, "q_norm", query, config.num_heads)
            key = self._qk_norm(index, "k_norm", key, config.num_kv_heads)
        if index not in config.layers_without_rope:
            query = builder.op("RotaryEmbedding", [query, *self.rotary], f"{name}.q_rotary", num_heads=config.num_heads)
            key = builder.op("RotaryEmbedding", [key, *self.rotary], f"{name}.k_rotary", num_heads=config.num_kv_heads)
        # The operator appends to the cache by itself, and takes the heads apart.
        attended, present_key, present_value = builder.op_outputs(
            "Attention",
            [query, key, value, self.mask, *past],
            [f"{name}.attention", *(present_name(index, part) for part in CACHE_PARTS)],
            q_num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.attention_scale,
        )
        return self._projection(index, "o_proj", attended), present_key, present_value

    def _mlp(self, index: int, normed: ir.Value) -> ir.Value:
        builder, name = self.builder, layer_tensor_name(index, "mlp")
        gate = self._projection(index, "gate_proj", normed)
        up = self._projection(index, "up_proj", normed)
        # SiLU in two nodes: Swish needs opset 24, and ONNX Runtime fuses these two into one kernel as fast.
        silu = builder.op("Mul", [gate, builder.op("Sigmoid", [gate], f"{name}.gate_sigmoid")], f"{name}.gate_silu")
        return self._projection(index, "down_proj", builder.op("Mul", [silu, up], f"{name}.gated"))

    def _head(self, normed: ir.Value, embeddings: ir.Value) -> ir.Value:
        divisor = self.config.multipliers.logits
        if divisor == 1:
            return self._undivided_head(normed, embeddings, LOGITS)
        logits = self._undivided_head(normed, embeddings, "head.undivided")
        constant = self.builder.constant("head.logits_scaling", np.asarray(divisor, self.dtype.numpy()))
        return self.builder.op("Div", [logits, constant], LOGITS)

    def _undivided_head(self, normed: ir.Value, embeddings: ir.Value, output: str) -> ir.Value:
        builder, config = self.builder, self.config
        if not config.tie_word_embeddings:
            return self._linear(normed, "lm_head", bias=False, output=output)
        # Gemm reads the embedding matrix as it is stored, but takes two dimensions only: tokens become rows, and get
        # their two axes back behind it.
        rows = builder.op(
            "Reshape", [normed, builder.constant("rows", np.array([-1, config.hidden_size]))], "head.rows"
        )
        scores = builder.op("Gemm", [rows, embeddings], "lm_head", transB=1)
        shape = builder.op(
            "Concat",
            [
                builder.op("Shape", [normed], "head.batch_and_sequence", start=0, end=2, dtype=ir.DataType.INT64),
                builder.constant("vocab_size", np.array([config.vocab_size])),
            ],
            "head.shape",
            axis=0,
        )
        return builder.op("Reshape", [scores, shape], output)

    def _block_norm(self, index: int, value: ir.Value, block: Block, *, behind: bool) -> ir.Value:
        """What a block reads, or (behind) what it adds, normalised where the family does so there."""
        norm = self.table.block_norm(block, behind=behind)
        return value if norm is None else self._norm(value, layer_tensor_name(index, norm.path))

    def _qk_norm(self, index: int, role: str, value: ir.Value, heads: int) -> ir.Value:
        """Queries or keys [batch, sequence, heads · head_dim], all heads normalised together or each by itself."""
        builder, name = self.builder, self._path(index, role)
        if self.table[role].axes != ("head",):
            return self._norm(value, name)
        # A 0 keeps the dimension as it is: batch and sequence stay free.
        apart = builder.constant(f"heads_{heads}", np.array([0, 0, heads, self.config.head_dim]))
        together = builder.constant(f"width_{heads}", np.array([0, 0, heads * self.config.head_dim]))
        normed = self._norm(builder.op("Reshape", [value, apart], f"{name}.heads"), name)
        return builder.op("Reshape", [normed, together], f"{name}.tokens")

    def _added(self, branch: ir.Value, name: str) -> ir.Value:
        """What a block adds to the residual stream."""
        return self._scaled(branch, self.config.multipliers.residual, "model.residual_multiplier", name)

    def _scaled(self, value: ir.Value, factor: float, constant: str, name: str) -> ir.Value:
        """A value of the graph's type times a constant; the value itself where that is 1."""
        if factor == 1:
            return value
        multiplier = self.builder.constant(constant, np.asarray(factor, self.dtype.numpy()))
        return self.builder.op("Mul", [value, multiplier], name)

    def _norm(self, value: ir.Value, name: str) -> ir.Value:
        """RMSNormalization-23, its mean of squares in fp32 whatever the dtype (stash_type 1)."""
        scale = self._weight(f"{name}.weight")
        return self.builder.op(
            "RMSNormalization", [value, scale], name, axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1
        )

    def _projection(self, index: int, role: str, value: ir.Value) -> ir.Value:
        return self._linear(value, self._path(index, role), bias=self.config.has_bias(self.table[role]))

    def _path(self, index: int, role: str) -> str:
        return layer_tensor_name(index, self.table[role].path)

    def _linear(self, value: ir.Value, name: str, *, bias: bool, output: str | None = None) -> ir.Value:
        weight = self._weight(f"{name}.weight", transposed=True)
        product = self.builder.op("MatMul", [value, weight], output or name)
        if not bias:
            return product
        return self.builder.op("Add", [product, self._weight(f"{name}.bias")], f"{name}.biased")

    def _weight(self, name: str, *, transposed: bool = False) -> ir.Value:
        return self.builder.weight(CheckpointWeight(name, self.tensors[name], self.dtype, transposed=transposed))

    def _cast(self, value: ir.Value) -> ir.Value:
        if self.dtype == ir.DataType.FLOAT:
            return value
        return self.builder.op("Cast", [value], f"{value.name}_cast", to=self.dtype.value, dtype=self.dtype)
