"""What stands between a step's matrix products, and its definition in PyTorch."""

from __future__ import annotations

import abc
import dataclasses

import torch
import torch.nn.functional as F

from dlo_export.modeling.skip_kernels import KernelMlp
from dlo_export.runtimes.torch.captured.step_weights import PlainMlp, Product


@dataclasses.dataclass(frozen=True)
class Decisions:
    """A routed layer's, of a step's tokens.

    Attributes:
        scores: float32 [tokens].
        scale: float32 [tokens]: what an active token's branch is multiplied by, 0 where the token skips.
    """

    scores: torch.Tensor
    scale: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a layer decides.

    Attributes:
        router: float32 [hidden].
        threshold: float32 [1], what an active token's score exceeds; on the device, so that replays see changes.
        branch_scale: (a, b): an active token's branch is multiplied by a + b · score.
    """

    router: torch.Tensor
    threshold: torch.Tensor
    branch_scale: tuple[float, float]


class StepOps(abc.ABC):
    """Nothing here waits for the device, and shapes depend on arguments' shapes alone: a CUDA graph may capture it."""

    @abc.abstractmethod
    def add_norm(
        self, stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with a branch added to it, and its RMS norm; all T [tokens, hidden]."""

    @abc.abstractmethod
    def add_norm_route(
        self, stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor, Decisions]:
        """The same, and what a router decides from the stream."""

    def product(self, rows: torch.Tensor, product: Product) -> torch.Tensor:
        """Rows [tokens, in] times a weight, T [tokens, out]."""
        return product(rows)

    @abc.abstractmethod
    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        start: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Rotates queries and keys by their positions, and puts keys and values into their slots of the cache.

        Args:
            qkv: T [batch · sequence, (heads + 2 · kv_heads) · head_dim].
            start: int64 [batch]: position and slot of each sequence's first token.
            rotary: Cosines and sines of all positions, T [capacity, head_dim / 2].
            keys: T [batch, kv_heads, capacity, head_dim].
            values: Likewise.

        Returns:
            Queries, T [batch · sequence, heads, head_dim].
        """

    @abc.abstractmethod
    def attend(
        self,
        qkv: torch.Tensor,
        start: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """One token per sequence: as `rotate_and_store`, and its attention to its own slot and those before.

        Returns:
            T [batch, heads · head_dim].
        """

    @abc.abstractmethod
    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up, T [tokens, intermediate], of both [tokens, 2 · intermediate]."""

    @abc.abstractmethod
    def skip_mlp(self, normed: torch.Tensor, scale: torch.Tensor, mlp: KernelMlp, stream: torch.Tensor) -> torch.Tensor:
        """The stream, and scale · MLP of the active tokens added to it; T [tokens, hidden]."""

    def plain_mlp(self, normed: torch.Tensor, mlp: PlainMlp) -> torch.Tensor:
        """What an MLP adds to the stream, for all tokens."""
        return mlp.down(self.gated(mlp.gate_up(normed)))


class TorchOps(StepOps):
    """Their definition: what transformers' modules compute, step by step."""

    def add_norm(  # noqa: D102
        self, stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = stream if added is None else stream + added
        wide = stream.float()
        even = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return stream, weight * even.to(stream.dtype)

    def add_norm_route(  # noqa: D102
        self, stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor, Decisions]:
        stream, normed = self.add_norm(stream, added, weight, epsilon)
        scores = torch.sigmoid(stream.float() @ routing.router)
        offset, slope = routing.branch_scale
        scale = torch.where(scores > routing.threshold, offset + slope * scores, 0.0)
        return stream, normed, Decisions(scores, scale)

    def rotate_and_store(  # noqa: D102
        self,
        qkv: torch.Tensor,
        start: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        batch, kv_heads, _, width = keys.shape
        by_head = qkv.view(batch, -1, qkv.shape[-1] // width, width)
        sequence, heads = by_head.shape[1], by_head.shape[2] - 2 * kv_heads
        slots = start[:, None] + torch.arange(sequence, device=start.device)
        cosines, sines = (table[slots].unsqueeze(2) for table in rotary)  # [batch, sequence, 1, head_dim / 2]
        first, second = by_head[:, :, : heads + kv_heads].chunk(2, dim=-1)
        rotated = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
        sequences = torch.arange(batch, device=start.device)[:, None]
        keys.transpose(1, 2).index_put_((sequences, slots), rotated[:, :, heads:])
        values.transpose(1, 2).index_put_((sequences, slots), by_head[:, :, heads + kv_heads :])
        return rotated[:, :, :heads].reshape(-1, heads, width)

    def attend(  # noqa: D102
        self,
        qkv: torch.Tensor,
        start: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        query = self.rotate_and_store(qkv, start, rotary, keys, values)
        seen = torch.arange(keys.shape[2], device=start.device) <= start[:, None]
        attended = F.scaled_dot_product_attention(
            query.unsqueeze(2), keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )
        return attended.flatten(1)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return _gated(gate_up)

    def skip_mlp(  # noqa: D102
        self, normed: torch.Tensor, scale: torch.Tensor, mlp: KernelMlp, stream: torch.Tensor
    ) -> torch.Tensor:
        return add_scaled(stream, mlp_branch(normed, mlp), scale)


def gathered_mlp(
    normed: torch.Tensor, scale: torch.Tensor, mlp: PlainMlp | KernelMlp, stream: torch.Tensor
) -> torch.Tensor:
    """As `StepOps.skip_mlp`, in PyTorch's products on the active tokens' rows; waits for the device to count them."""
    active = scale.nonzero().squeeze(-1)
    branch = mlp_branch(normed.index_select(0, active), mlp)
    before = stream.index_select(0, active)
    after = before + branch * scale.index_select(0, active).unsqueeze(-1).to(branch.dtype)
    return stream.index_copy(0, active, after)


def mlp_branch(rows: torch.Tensor, mlp: PlainMlp | KernelMlp) -> torch.Tensor:
    """The MLP of rows [rows, hidden], in PyTorch's products, however its weights are kept."""
    if isinstance(mlp, KernelMlp):
        return (F.silu(rows @ mlp.gate) * (rows @ mlp.up)) @ mlp.down
    return mlp.down(_gated(mlp.gate_up(rows)))


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_scaled(stream: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The stream [tokens, hidden], and scale · branch where the scale is not 0: not 0 · branch, which may be NaN."""
    scale = scale.unsqueeze(-1)
    return torch.where(scale != 0, stream + branch * scale.to(branch.dtype), stream)
