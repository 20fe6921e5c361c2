"""A decoder layer of which tokens skip a part: the MLP, attention, or all of it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.active_attention import attend_among_active, attend_to_all
from dlo_export.modeling.active_tokens import ActiveTokens, MaskedTokens, TokenRows, every_token
from dlo_export.modeling.configuration import LlamaDloConfig
from dlo_export.modeling.family_modules import block_branch, block_input, use_family_modules
from dlo_export.modeling.routing import (
    GateTokens,
    SelectTokens,
    TokenRouter,
    TrainingRouting,
    is_active,
    mixed,
    straight_through,
)
from dlo_export.modeling.skip_kernels import KernelMlp, SkipKernels, kernel_mlp, skip_mlp


class RoutedDecoderLayer(LlamaDecoderLayer, abc.ABC):
    """A decoder layer that tokens may skip in part; without a router, its family's own."""

    def __init__(self, config: LlamaDloConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        use_family_modules(self, config, layer_idx)

    def forward(  # type: ignore[override]  # noqa: PLR0913, PLR0917 - what a step asks of its layers
        self,
        hidden_states: torch.Tensor,
        router: TokenRouter | None = None,
        branch_scale: tuple[float, float] = (1.0, 0.0),
        threshold: float = ONE_HALF,
        force_active: torch.Tensor | None = None,
        masked: bool = False,
        select_tokens: SelectTokens | None = None,
        gate_tokens: GateTokens | None = None,
        skip_kernels: SkipKernels = False,
        **attention_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | TrainingRouting | None]:
        """Runs the layer.

        Args:
            hidden_states: The residual stream, [batch, sequence, hidden].
            router: Decides from the residual stream as it comes in, before norm and attention.
            branch_scale: (a, b): the branch that is skipped, the MLP where both are, is multiplied by a + b·score.
            threshold: What the score of an active token exceeds.
            force_active: bool [batch, sequence], decisions to use in place of the router's. Scores stay the router's.
            masked: Compute all for every token and discard it for those that skip.
            select_tokens: Decides in place of the router's threshold, in training.
            gate_tokens: Softens these decisions into shares of what is skipped.
            skip_kernels: Run what is skipped in the dlo kernels; see `LlamaDloModel`.
            attention_kwargs: Whatever transformers' attention takes.

        Returns:
            The residual stream after the layer; if it is routed, the scores (float32 [batch, sequence]), or all that
            training needs where `select_tokens` is given.

        Raises:
            InputError: `skip_kernels` is True, and the kernels do not take this layer.
            MachineError: Likewise, and they do not run here.
        """
        # The router sees the stream as it comes in: no decision waits for attention.
        scores = None if router is None else router(hidden_states)
        if scores is None:
            attended = self._attended(hidden_states, **attention_kwargs)
            return attended + self._mlp_branch(attended), None
        offset, slope = branch_scale
        scale = None if (offset, slope) == (1.0, 0.0) else offset + slope * scores
        if select_tokens is not None:
            active = select_tokens(scores.detach())
            gate = None if gate_tokens is None else gate_tokens(scores)
            return self._trained(hidden_states, scores, active, scale, gate, **attention_kwargs)
        active = is_active(scores, threshold) if force_active is None else force_active
        mlp = self._kernel_mlp(hidden_states, skip_kernels)
        if mlp is not None:
            attended = self._attended(hidden_states, **attention_kwargs)
            # One vector says who is active and how much of the branch they get: 0 is none of it.
            factor = torch.where(active, offset + slope * scores, 0.0)
            normed = block_input(self, "mlp", attended)
            return skip_mlp(normed.contiguous(), factor.contiguous(), mlp, attended.contiguous()), scores
        # Whose rows are gathered the host asks the device, and waits for its answer.
        tokens = MaskedTokens(active) if masked else ActiveTokens(active)
        kept, before, branch = self._routed(hidden_states, tokens, active, **attention_kwargs)
        return self._finished(tokens.put(before + _scaled(branch, scale, tokens), kept)), scores

    @abc.abstractmethod
    def _routed(
        self, hidden_states: torch.Tensor, tokens: TokenRows, active: torch.Tensor, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes for some tokens what can be skipped.

        Args:
            hidden_states: The layer's input, [batch, sequence, hidden].
            tokens: For whom.
            active: bool [batch, sequence]: whom they see.
            attention_kwargs: As above.

        Returns:
            What a token keeps that skips, [batch, sequence, hidden]; for `tokens`, the stream before the branch that is
            scaled, and what that branch adds to it, [n, hidden] both.
        """

    def _kernel_mlp(self, hidden_states: torch.Tensor, wanted: SkipKernels) -> KernelMlp | None:
        """The MLP for the dlo kernels, which skip MLPs and nothing else; None where it runs in PyTorch's operators."""
        del hidden_states, wanted
        return None

    def _finished(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What no token skips, behind what some do: nothing, unless a kind of routing has more."""
        return hidden_states

    @abc.abstractmethod
    def _similarity(
        self, hidden_states: torch.Tensor, kept: torch.Tensor, output: torch.Tensor, **attention_kwargs: Any
    ) -> torch.Tensor:
        """`TrainingRouting.similarity`; `output` is `kept` with everything added to it, unscaled."""

    def _trained(
        self,
        hidden_states: torch.Tensor,
        scores: torch.Tensor,
        active: torch.Tensor,
        scale: torch.Tensor | None,
        gate: torch.Tensor | None,
        **attention_kwargs: Any,
    ) -> tuple[torch.Tensor, TrainingRouting]:
        """Computes every token as if it were active: routers also learn from what the tokens that skip would get."""
        tokens = every_token(hidden_states)
        kept, before, branch = self._routed(hidden_states, tokens, active, **attention_kwargs)
        computed = tokens.put(before + _scaled(branch, scale, tokens), kept)
        with torch.no_grad():
            unscaled = computed if scale is None else tokens.put(before + branch, kept)
            similarity = self._similarity(hidden_states, kept, unscaled, **attention_kwargs)
        chosen = straight_through(computed, kept, scores, active) if gate is None else mixed(computed, kept, gate)
        return self._finished(chosen), TrainingRouting(scores, active, similarity)

    def _similarity_unskipped(self, hidden_states: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        """Similarity where skipped tokens are hidden: what is skipped does where nobody is, as the DLO authors have it.

        The run that the stream goes on with saw the selected tokens only: once a token is hidden, its similarity would
        depend on who was selected.
        """
        tokens = every_token(hidden_states)
        all_active = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        # The first run has written the cache, if there is one.
        attention_kwargs = {**attention_kwargs, "past_key_values": None}
        _, rows, branch = self._routed(hidden_states, tokens, all_active, **attention_kwargs)
        return _cosine(hidden_states, tokens.put(rows + branch, hidden_states))

    def _attended(self, hidden_states: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        attended: torch.Tensor
        attended, _ = self.self_attn(hidden_states=block_input(self, "self_attn", hidden_states), **attention_kwargs)
        return hidden_states + block_branch(self, "self_attn", attended)

    def _attended_among_active(
        self, rows: torch.Tensor, tokens: TokenRows, active: torch.Tensor, **attention_kwargs: Any
    ) -> torch.Tensor:
        """What attention adds to the rows of `tokens`, [n, hidden], where skipped tokens are hidden."""
        normed = block_input(self, "self_attn", rows)
        attended = attend_among_active(self.self_attn, normed, tokens, active, **attention_kwargs)
        return block_branch(self, "self_attn", attended)

    def _mlp_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not hidden_states.numel():
            return hidden_states
        return block_branch(self, "mlp", self.mlp(block_input(self, "mlp", hidden_states)))


class MlpRoutedLayer(RoutedDecoderLayer):
    """Attention runs for every token, so that the cache is whole; a token that skips goes without the MLP."""

    def _routed(
        self, hidden_states: torch.Tensor, tokens: TokenRows, active: torch.Tensor, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attended = self._attended(hidden_states, **attention_kwargs)
        rows = tokens.gather(attended)
        return attended, rows, self._mlp_branch(rows)

    def _kernel_mlp(self, hidden_states: torch.Tensor, wanted: SkipKernels) -> KernelMlp | None:
        return kernel_mlp(self, hidden_states, wanted)

    def _similarity(
        self, hidden_states: torch.Tensor, kept: torch.Tensor, output: torch.Tensor, **attention_kwargs: Any
    ) -> torch.Tensor:
        # The MLP of a token depends on no other token: the one run serves the labels too.
        return _cosine(kept, output)


class WhollyRoutedLayer(RoutedDecoderLayer):
    """A token that skips stays what it was, and is not seen by those that do not."""

    def _routed(
        self, hidden_states: torch.Tensor, tokens: TokenRows, active: torch.Tensor, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = tokens.gather(hidden_states)
        rows = rows + self._attended_among_active(rows, tokens, active, **attention_kwargs)
        return hidden_states, rows, self._mlp_branch(rows)

    def _similarity(
        self, hidden_states: torch.Tensor, kept: torch.Tensor, output: torch.Tensor, **attention_kwargs: Any
    ) -> torch.Tensor:
        return self._similarity_unskipped(hidden_states, **attention_kwargs)


class AttentionRoutedLayer(RoutedDecoderLayer):
    """A token that skips attention leaves its keys and values all the same; the MLP runs for every token."""

    def _routed(
        self, hidden_states: torch.Tensor, tokens: TokenRows, active: torch.Tensor, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = block_input(self, "self_attn", hidden_states)
        attended = attend_to_all(self.self_attn, normed, tokens, **attention_kwargs)
        return hidden_states, tokens.gather(hidden_states), block_branch(self, "self_attn", attended)

    def _finished(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self._mlp_branch(hidden_states)

    def _similarity(
        self, hidden_states: torch.Tensor, kept: torch.Tensor, output: torch.Tensor, **attention_kwargs: Any
    ) -> torch.Tensor:
        # What a token is given depends on everybody's keys, and on nobody's decision.
        return _cosine(kept, output)


class ActiveAttentionRoutedLayer(AttentionRoutedLayer):
    """A token that skips attention is not seen by those that do not; the MLP runs for every token."""

    def _routed(
        self, hidden_states: torch.Tensor, tokens: TokenRows, active: torch.Tensor, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = tokens.gather(hidden_states)
        return hidden_states, rows, self._attended_among_active(rows, tokens, active, **attention_kwargs)

    def _similarity(
        self, hidden_states: torch.Tensor, kept: torch.Tensor, output: torch.Tensor, **attention_kwargs: Any
    ) -> torch.Tensor:
        return self._similarity_unskipped(hidden_states, **attention_kwargs)


ROUTED_LAYERS: Mapping[RoutingKind, type[RoutedDecoderLayer]] = {
    "mlp": MlpRoutedLayer,
    "layer": WhollyRoutedLayer,
    "attention": AttentionRoutedLayer,
    "attention-active": ActiveAttentionRoutedLayer,
}
"""The decoder layer of each kind of routing."""


def _scaled(branch: torch.Tensor, scale: torch.Tensor | None, tokens: TokenRows) -> torch.Tensor:
    return branch if scale is None else branch * tokens.gather(scale).unsqueeze(-1).to(branch.dtype)


def _cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(before.float(), after.float(), dim=-1)
