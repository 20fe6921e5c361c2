"""Decodes with a routed Llama at fixed shapes: one launch per step, and no step waits for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dlo_export.runtimes.errors import BackendUnavailableError, StepError
from dlo_export.runtimes.torch.captured.step_ops import (
    Decisions,
    KernelOps,
    Routing,
    StepOps,
    TorchOps,
    add_scaled,
    gathered_mlp,
)
from dlo_export.runtimes.torch.captured.step_weights import KernelMlp, LayerWeights, StepWeights


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step gives, on the device; the next step overwrites it.

    Attributes:
        logits: T [batch, vocabulary], of each sequence's last token.
        scores: By routed layer, float32 [batch, sequence].
    """

    logits: torch.Tensor
    scores: dict[int, torch.Tensor]


class CapturedDecoder:
    """A static cache, and a decode step that a CUDA graph replays; on a CPU the same step runs as it is.

    The graph reads tokens, positions and thresholds where they lie, and the kernels of routed MLPs read decisions on
    the device: a replay skips what its own tokens skip.

    Args:
        weights: Of the model.
        batch: Sequences.
        capacity: Tokens of a sequence, prompt included.
        ops: What runs between products: None takes the kernels on CUDA, PyTorch elsewhere.
        gather_prompts: Routed MLPs of a prompt run as PyTorch's products on the active tokens' rows, which the host
            waits to have counted, layer by layer.
        capture: None where the model is on CUDA.

    Attributes:
        thresholds: float32 [layers], on the device: what an active token's score exceeds. Changes count from the next
            step on.

    Raises:
        BackendUnavailableError: Triton is missing.
    """

    def __init__(
        self,
        weights: StepWeights,
        *,
        batch: int,
        capacity: int,
        ops: StepOps | None = None,
        gather_prompts: bool = False,
        capture: bool | None = None,
    ) -> None:
        model, config = weights.model, weights.model.config
        embedding = model.model.embed_tokens.weight.data
        on_cuda = embedding.is_cuda
        self._weights, self._embedding = weights, embedding
        self._norm, self._head = model.model.norm.weight.data, model.lm_head.weight.data
        self._epsilon = config.rms_norm_eps
        self._ops = ops or (kernel_ops() if on_cuda else TorchOps())
        self._batch, self._capacity, self._gather_prompts = batch, capacity, gather_prompts
        width = config.head_dim or config.hidden_size // config.num_attention_heads
        cache = (2, config.num_hidden_layers, batch, config.num_key_value_heads, capacity, width)
        self._keys, self._values = embedding.new_zeros(cache)
        with torch.inference_mode():
            places = torch.arange(capacity, device=embedding.device).unsqueeze(0)
            # Both halves of transformers' tables are the same.
            cosines, sines = (
                table[0, :, : width // 2].contiguous() for table in model.model.rotary_emb(embedding, places)
            )
        self._rotary = cosines, sines
        self.thresholds = torch.tensor(weights.thresholds, dtype=torch.float32, device=embedding.device)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=embedding.device)
        self._start = torch.zeros_like(self._tokens)
        self._lengths: list[int] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        if on_cuda if capture is None else capture:
            self._capture()

    @torch.inference_mode()
    def prefill(self, input_ids: torch.Tensor, lengths: Sequence[int] | None = None) -> StepOutput:
        """Begins anew with prompts.

        Args:
            input_ids: int64 [batch, sequence]; what stands behind a prompt's end is ignored.
            lengths: Tokens of each prompt, at least 1; the whole row where it is None.

        Raises:
            StepError: The prompts are not `batch`, or do not fit.
        """
        batch, sequence = input_ids.shape
        lengths = [sequence] * batch if lengths is None else list(lengths)
        if batch != self._batch or len(lengths) != batch:
            raise StepError(
                f"captured decode: got {batch} prompts and {len(lengths)} lengths, expected {self._batch}",
                hint="open a decoder of another batch",
            )
        if not 1 <= min(lengths) <= max(lengths) <= sequence <= self._capacity:
            raise StepError(
                f"captured decode: got prompts of {min(lengths)} to {max(lengths)} tokens in rows of {sequence}, "
                f"expected 1 to {self._capacity}",
                hint="open a decoder of a larger capacity",
            )
        self._start.zero_()
        hidden, decisions = self._forward(input_ids.to(self._start.device).reshape(-1), sequence)
        self._lengths = lengths
        self._start.copy_(torch.tensor(lengths))
        ends = torch.arange(batch, device=hidden.device) * sequence + self._start - 1
        return self._output(hidden.index_select(0, ends), decisions)

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> StepOutput:
        """Runs one more token of each sequence.

        Args:
            tokens: int64 [batch].

        Raises:
            StepError: There was no prompt, or the cache is full.
        """
        if not self._lengths:
            raise StepError("captured decode: decode before prefill", hint="call prefill with the prompts")
        if max(self._lengths) >= self._capacity:
            raise StepError(
                f"captured decode: all {self._capacity} slots of a sequence are in use",
                hint="open a decoder of a larger capacity",
            )
        self._lengths = [length + 1 for length in self._lengths]
        self._tokens.copy_(tokens)
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._captured

    def crop(self, lengths: Sequence[int]) -> None:
        """Forgets each sequence's tokens behind the first so many.

        Args:
            lengths: By sequence, at least 1.

        Raises:
            StepError: A sequence has fewer tokens.
        """
        if len(lengths) != len(self._lengths) or not all(
            1 <= length <= held for length, held in zip(lengths, self._lengths, strict=True)
        ):
            raise StepError(
                f"captured decode: got lengths {list(lengths)}, expected at least 1 and at most {self._lengths}",
                hint="a cache can only be made shorter",
            )
        self._lengths = list(lengths)
        self._start.copy_(torch.tensor(lengths))

    def _step(self) -> StepOutput:
        hidden, decisions = self._forward(self._tokens, 1)
        output = self._output(hidden, decisions)
        self._start.add_(1)
        return output

    def _output(self, rows: torch.Tensor, decisions: dict[int, Decisions]) -> StepOutput:
        scores = {layer: made.scores.view(self._batch, -1) for layer, made in decisions.items()}
        return StepOutput(F.linear(rows, self._head), scores)

    def _forward(self, ids: torch.Tensor, sequence: int) -> tuple[torch.Tensor, dict[int, Decisions]]:
        """From tokens [batch · sequence] to normalised hidden states [batch · sequence, hidden] and decisions."""
        ops, decisions = self._ops, {}
        stream, added = F.embedding(ids, self._embedding), None
        for index, layer in enumerate(self._weights.layers):
            if layer.router is None:
                made = None
                stream, normed = ops.add_norm(stream, added, layer.attention_norm, self._epsilon)
            else:
                routing = Routing(layer.router, self.thresholds[index : index + 1], self._weights.branch_scale)
                stream, normed, made = ops.add_norm_route(stream, added, layer.attention_norm, self._epsilon, routing)
                decisions[index] = made
            added = self._attention(index, layer, normed, sequence)
            stream, normed = ops.add_norm(stream, added, layer.mlp_norm, self._epsilon)
            # What an MLP adds is left to the next norm, but for a routed one, which knows whose rows it leaves alone.
            added = None
            if made is not None and self._gather_prompts and sequence > 1:
                stream = gathered_mlp(normed, made.scale, layer.mlp, stream)
            elif isinstance(layer.mlp, KernelMlp):
                assert made is not None, "only routed MLPs are given to the kernels"
                stream = ops.skip_mlp(normed, made.scale, layer.mlp, stream)
            elif made is None:
                added = ops.plain_mlp(normed, layer.mlp)
            else:
                stream = add_scaled(stream, ops.plain_mlp(normed, layer.mlp), made.scale)
        _, normed = ops.add_norm(stream, added, self._norm, self._epsilon)
        return normed, decisions

    def _attention(self, index: int, layer: LayerWeights, normed: torch.Tensor, sequence: int) -> torch.Tensor:
        keys, values = self._keys[index], self._values[index]
        qkv, rotary = layer.qkv(normed), self._rotary
        if sequence == 1:
            attended = self._ops.attend(qkv, self._start, rotary, keys, values)
        else:
            query = self._ops.rotate_and_store(qkv, self._start, rotary, keys, values)
            # A prompt begins an empty cache. What stands behind a shorter one's end nobody sees: decode overwrites it.
            attended = F.scaled_dot_product_attention(
                query.view(self._batch, sequence, *query.shape[1:]).transpose(1, 2),
                keys[:, :, :sequence],
                values[:, :, :sequence],
                is_causal=True,
                enable_gqa=True,
            )
            attended = attended.transpose(1, 2).reshape(len(query), -1)
        return layer.out(attended)

    def _capture(self) -> None:
        """Records a step, with an empty cache: what it writes to slot 0 the first prompt overwrites."""
        with torch.cuda.device(self._start.device), torch.inference_mode():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            # Kernels are compiled, and libraries make their handles, before a capture, which allows neither.
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._start.zero_()
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self._start.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._captured = self._step()
            self._start.zero_()
            self._graph = graph


def kernel_ops() -> StepOps:
    """The kernels.

    Raises:
        BackendUnavailableError: Triton is missing.
    """
    try:
        return KernelOps()
    except ModuleNotFoundError as err:
        raise BackendUnavailableError(
            f"captured decode: {err.name} is missing", hint="install triton, which comes with PyTorch for CUDA"
        ) from err
