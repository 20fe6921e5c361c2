"""Decodes with a routed Llama at fixed shapes: one launch per step, and no step waits for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from dlo_export.modeling.skip_kernels import KernelMlp
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.torch.captured.kernel_ops import kernel_ops
from dlo_export.runtimes.torch.captured.step_ops import (
    Decisions,
    Routing,
    StepOps,
    TorchOps,
    add_scaled,
    gathered_mlp,
)
from dlo_export.runtimes.torch.captured.step_weights import StepWeights


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
        prompt: Prompts of up to so many tokens are padded to it, and a graph replays them too; 0 for none. Others, and
            all without a graph, run launch by launch, at the host's pace.
        gather_prompts: Routed MLPs of prompts without a graph run as PyTorch's products on the active tokens' rows,
            which the host waits to have counted, layer by layer.
        capture: None where the model is on CUDA.

    Attributes:
        thresholds: float32 [layers], on the device: what an active token's score exceeds. Changes count from the next
            step on.

    Raises:
        BackendUnavailableError: Triton is missing.
        StepError: `prompt` is more than the capacity, or given with `gather_prompts`.
    """

    def __init__(
        self,
        weights: StepWeights,
        *,
        batch: int,
        capacity: int,
        prompt: int = 0,
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
        self._ops = ops or (kernel_ops(embedding, batch) if on_cuda else TorchOps())
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
        if prompt > (0 if gather_prompts else capacity):
            raise StepError(
                f"captured decode: got prompts of {prompt} tokens to capture, expected {capacity} at most, the "
                "capacity, and none where the host counts their active tokens",
                hint="open it with a larger capacity, or without gather_prompts",
            )
        self._prompts = torch.zeros(batch, prompt, dtype=torch.int64, device=embedding.device)
        self._prompt_lengths = torch.ones_like(self._tokens)
        self._decode_graph: Recorded | None = None
        self._prompt_graph: Recorded | None = None
        if on_cuda if capture is None else capture:
            # The cache is empty: what is written to it, the first prompt overwrites.
            self._decode_graph = Recorded(self._decode_step, self._start)
            if prompt:
                self._prompt_graph = Recorded(lambda: self._prompt_step(self._prompts), self._start)

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
        self._lengths = lengths
        self._prompt_lengths.copy_(torch.tensor(lengths))
        if self._prompt_graph is not None and sequence <= self._prompts.shape[1]:
            self._prompts[:, :sequence].copy_(input_ids)
            output = self._prompt_graph.replay()
            return StepOutput(output.logits, {layer: made[:, :sequence] for layer, made in output.scores.items()})
        return self._prompt_step(input_ids.to(self._start.device))

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
                hint="open a decoder of a larger capacity; a sequence that has ended, crop to fewer tokens: what its "
                "row then computes and writes is nobody's",
            )
        self._tokens.copy_(tokens)
        output = self._decode_step() if self._decode_graph is None else self._decode_graph.replay()
        self._lengths = [length + 1 for length in self._lengths]
        return output

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

    def _prompt_step(self, prompts: torch.Tensor) -> StepOutput:
        batch, sequence = prompts.shape
        self._start.zero_()
        stream, added, decisions = self._forward(prompts.reshape(-1), sequence)
        self._start.copy_(self._prompt_lengths)
        ends = torch.arange(batch, device=stream.device) * sequence + self._start - 1
        last = None if added is None else added.index_select(0, ends)
        return self._output(stream.index_select(0, ends), last, decisions)

    def _decode_step(self) -> StepOutput:
        output = self._output(*self._forward(self._tokens, 1))
        self._start.add_(1)
        return output

    def _output(self, stream: torch.Tensor, added: torch.Tensor | None, decisions: dict[int, Decisions]) -> StepOutput:
        scores = {layer: made.scores.view(self._batch, -1) for layer, made in decisions.items()}
        _, normed = self._ops.add_norm(stream, added, self._norm, self._epsilon)
        return StepOutput(F.linear(normed, self._head), scores)

    def _forward(
        self, ids: torch.Tensor, sequence: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[int, Decisions]]:
        """From tokens to the stream [batch · sequence, hidden], what is still to be added to it, and decisions."""
        ops, epsilon = self._ops, self._epsilon
        decisions: dict[int, Decisions] = {}
        gathers = self._gather_prompts and sequence > 1
        stream, added = F.embedding(ids, self._embedding), None
        for index, layer in enumerate(self._weights.layers):
            made = None
            if layer.router is None:
                stream, normed = ops.add_norm(stream, added, layer.attention_norm, epsilon)
            else:
                routing = Routing(layer.router, self.thresholds[index : index + 1], self._weights.branch_scale)
                stream, normed, made = ops.add_norm_route(stream, added, layer.attention_norm, epsilon, routing)
                decisions[index] = made
            added = ops.product(self._attended(index, ops.product(normed, layer.qkv), sequence), layer.out)
            if layer.mlp is None:
                continue
            stream, normed = ops.add_norm(stream, added, layer.mlp_norm, epsilon)
            # What an MLP adds is left to the next norm, but for a routed one, which knows whose rows it leaves alone.
            added = None
            if made is not None and gathers:
                stream = gathered_mlp(normed, made.scale, layer.mlp, stream)
            elif isinstance(layer.mlp, KernelMlp):
                assert made is not None, "only routed MLPs are given to the kernels"
                stream = ops.skip_mlp(normed, made.scale, layer.mlp, stream)
            elif made is None:
                added = ops.plain_mlp(normed, layer.mlp)
            else:
                stream = add_scaled(stream, ops.plain_mlp(normed, layer.mlp), made.scale)
        return stream, added, decisions

    def _attended(self, index: int, qkv: torch.Tensor, sequence: int) -> torch.Tensor:
        keys, values = self._keys[index], self._values[index]
        if sequence == 1:
            return self._ops.attend(qkv, self._start, self._rotary, keys, values)
        query = self._ops.rotate_and_store(qkv, self._start, self._rotary, keys, values)
        # A prompt begins an empty cache. What stands behind a shorter one's end nobody sees: decode overwrites it.
        attended = F.scaled_dot_product_attention(
            query.view(self._batch, sequence, *query.shape[1:]).transpose(1, 2),
            keys[:, :, :sequence],
            values[:, :, :sequence],
            is_causal=True,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).reshape(len(query), -1)


class Recorded:
    """A CUDA graph of a step.

    Args:
        step: Waits for nothing on the device, and reads and writes tensors that stay where they are.
        start: Where sequences begin: zeros before the step, and afterwards again.
    """

    def __init__(self, step: Callable[[], StepOutput], start: torch.Tensor) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(start.device), torch.inference_mode():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            # Kernels are compiled, and libraries make their handles, before a capture, which allows neither.
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
                    start.zero_()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._output = step()
            start.zero_()

    def replay(self) -> StepOutput:
        """Runs the step; its output lies where the last one lay."""
        self._graph.replay()
        return self._output
