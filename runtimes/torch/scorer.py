"""Scores tokens with a PyTorch model: only the logits that are needed, where the model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import dlo_export.modeling.llama_dlo  # noqa: F401 - registers the routed models with AutoModelForCausalLM
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.perplexity import TokenScores, score_hidden_states
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.evaluation.scorer import (
    CPU_TOKENS_AT_ONCE,
    BatchScores,
    Segment,
    SegmentScores,
    active_tokens,
    begin_alike,
    padded_ids,
)

_GPU_TOKENS_AT_ONCE = 16 * CPU_TOKENS_AT_ONCE  # logits are made in pieces, so these are hidden states alone


class TorchScorer:
    """Of a Llama in memory: transformers' LlamaForCausalLM, our LlamaDloForCausalLM.

    Args:
        model: Its head is a linear layer on the decoder's output, and nothing behind it. It is put into evaluation
            mode and moved to the device.
        device: As `--device` names it.
        name: For reports.

    Raises:
        MachineError: PyTorch finds no such device.
    """

    def __init__(self, model: Any, *, device: str = "cpu", name: str = "PyTorch") -> None:
        self._device = torch_device(device)
        on_cpu = self._device.type == "cpu"
        self.name = name
        # A GPU would rather compute a context several times than run many small steps.
        self.shares_contexts = on_cpu
        self.tokens_at_once = CPU_TOKENS_AT_ONCE if on_cpu else _GPU_TOKENS_AT_ONCE
        self._model = model.eval().to(self._device)
        self._head = model.get_output_embeddings()
        self._vocab_size = int(model.get_input_embeddings().num_embeddings)

    def score(self, segments: Sequence[Segment]) -> BatchScores:
        """See `TokenScorer`.

        Raises:
            StepError: A token is none of the model's.
        """
        largest = max(int(segment.ids.max()) for segment in segments)
        if largest >= self._vocab_size:
            raise StepError(
                f"{self.name}: got token {largest}, the model has {self._vocab_size}",
                hint="the tokenizer belongs to another model",
            )
        with torch.inference_mode():
            return self._shared(segments) if begin_alike(segments) else self._plain(segments)

    def _plain(self, segments: Sequence[Segment]) -> BatchScores:
        output = self._decoded([segment.ids[:-1] for segment in segments], None)
        rows = [output.last_hidden_state[i, segment.start - 1 : segment.read] for i, segment in enumerate(segments)]
        lengths = [segment.read for segment in segments]
        return BatchScores(self._scores(rows, segments), sum(lengths), self._active(output, lengths))

    def _shared(self, segments: Sequence[Segment]) -> BatchScores:
        """The context runs once; the cache behind it is continued by each segment."""
        start = segments[0].start
        cache = DynamicCache()
        context = self._decoded([segments[0].ids[:start]], cache)
        active = self._active(context, [start])
        rows = [context.last_hidden_state[0, -1:]] * len(segments)
        lengths = [segment.read - start for segment in segments]
        if any(lengths):
            cache.batch_repeat_interleave(len(segments))
            output = self._decoded([segment.ids[start:-1] for segment in segments], cache)
            later = output.last_hidden_state
            rows = [torch.cat([rows[i], later[i, :length]]) for i, length in enumerate(lengths)]
            for layer, count in self._active(output, lengths).items():
                active[layer] += count
        return BatchScores(self._scores(rows, segments), start + sum(lengths), active)

    def _decoded(self, sequences: Sequence[Any], cache: DynamicCache | None) -> Any:
        """Without a mask: padding stands at the right, where a causal decoder's other tokens do not see it."""
        ids = torch.from_numpy(padded_ids(sequences)).to(self._device)
        return self._model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)

    def _scores(self, rows: Sequence[torch.Tensor], segments: Sequence[Segment]) -> tuple[SegmentScores, ...]:
        targets = torch.cat([torch.from_numpy(segment.ids[segment.start :]) for segment in segments])
        scores: TokenScores = score_hidden_states(
            self._head, torch.cat(list(rows)), targets.to(self._device), self._vocab_size
        )
        ends = np.cumsum([segment.scored for segment in segments])[:-1]
        losses, most_likely = (np.split(values.cpu().numpy(), ends) for values in scores)
        return tuple(map(SegmentScores, losses, most_likely))

    def _active(self, output: Any, lengths: Sequence[int]) -> dict[int, int]:
        scores = getattr(output, "router_scores", None) or {}
        arrays = {layer: values.float().cpu().numpy() for layer, values in scores.items()}
        return active_tokens(arrays, lengths, self._model.config.thresholds if scores else {})
