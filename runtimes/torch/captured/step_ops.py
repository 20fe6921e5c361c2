"""What stands between a step's matrix products: what it is, in PyTorch, and the same in Triton kernels."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F

from dlo_export.modeling.skip_kernels import KernelMlp, skip_mlp
from dlo_export.plugins.tiles import MOST_TOKENS
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


_PROGRAMS = 128


class KernelOps(StepOps):
    """One launch each. For one decoder, on one stream: launches share counters.

    Args:
        early: 0 starts kernels one after the other. With 1 a kernel starts once the one in front has its inputs, with 2
            once that one has started, and waits where it needs what the other writes (programmatic dependent launch).
            Takes compute capability 9.0.
        vectors: Products of one token run in a kernel of their own, whose weights are on their way while it waits.
        programs: That attention is split among at the most; about as many as the GPU has multiprocessors.
    """

    def __init__(self, *, early: int = 0, vectors: bool = False, programs: int = _PROGRAMS) -> None:
        # Only here is Triton needed, and it may be missing.
        from dlo_export.runtimes.torch.captured import step_kernels  # noqa: PLC0415

        self._kernels: Any = step_kernels
        self._vectors, self._programs = vectors, programs
        self._early: dict[str, Any] = {"EARLY": early, **({"launch_pdl": True} if early else {})}
        self._arrived: dict[int, torch.Tensor] = {}

    def add_norm(  # noqa: D102
        self, stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream, normed, _ = self._add_norm(stream, added, weight, epsilon, None)
        return stream, normed

    def add_norm_route(  # noqa: D102
        self, stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor, Decisions]:
        stream, normed, decisions = self._add_norm(stream, added, weight, epsilon, routing)
        assert decisions is not None, "a routing was given"
        return stream, normed, decisions

    def _add_norm(
        self,
        stream: torch.Tensor,
        added: torch.Tensor | None,
        weight: torch.Tensor,
        epsilon: float,
        routing: Routing | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Decisions | None]:
        tokens, hidden = stream.shape
        normed = torch.empty_like(stream)
        summed = stream if added is None else torch.empty_like(stream)
        # A pointer that is not used is another operand's.
        scores = scale = router = threshold = normed
        offset, slope = 1.0, 0.0
        if routing is not None:
            scores, scale = (stream.new_empty(tokens, dtype=torch.float32) for _ in range(2))
            router, threshold, (offset, slope) = routing.router, routing.threshold, routing.branch_scale
        block = _power_of_two(hidden)
        self._kernels.add_norm_kernel[(tokens,)](
            stream,
            stream if added is None else added,
            weight,
            router,
            threshold,
            summed,
            normed,
            scores,
            scale,
            hidden,
            epsilon,
            offset,
            slope,
            ADDS=added is not None,
            ROUTES=routing is not None,
            BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
            **self._early,
        )
        return summed, normed, None if routing is None else Decisions(scores, scale)

    def rotate_and_store(  # noqa: D102
        self,
        qkv: torch.Tensor,
        start: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        tokens = len(qkv)
        batch, kv_heads, capacity, width = keys.shape
        heads = qkv.shape[-1] // width - 2 * kv_heads
        query = qkv.new_empty(tokens, heads, width)
        self._kernels.rotate_and_store_kernel[(tokens, heads + 2 * kv_heads)](
            qkv,
            start,
            *rotary,
            query,
            keys,
            values,
            tokens // batch,
            heads,
            kv_heads,
            capacity,
            HEAD=width,
            BLOCK=_power_of_two(width // 2),
            num_warps=1,
        )
        return query

    def attend(  # noqa: D102
        self,
        qkv: torch.Tensor,
        start: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        batch, kv_heads, capacity, width = keys.shape
        heads = qkv.shape[-1] // width - 2 * kv_heads
        wide = _power_of_two(width, 16)
        slots = slots_of(wide, qkv.itemsize)
        splits = _splits(self._programs, batch * kv_heads, capacity, slots)
        partial = qkv.new_empty(batch, heads, splits, width, dtype=torch.float32)
        peaks, totals = (qkv.new_empty(batch, heads, splits, dtype=torch.float32) for _ in range(2))
        attended = qkv.new_empty(batch, heads * width)
        self._kernels.attend_kernel[(batch * kv_heads, splits)](
            qkv,
            start,
            *rotary,
            keys,
            values,
            partial,
            peaks,
            totals,
            self._counters(batch * kv_heads, start.device),
            attended,
            width**-0.5,
            kv_heads,
            capacity,
            GROUP=heads // kv_heads,
            ROWS=_power_of_two(heads // kv_heads, 16),
            HEAD=width,
            WIDTH=wide,
            BLOCK=slots,
            SPLITS=splits,
            num_warps=4,
            **self._early,
        )
        return attended

    def _counters(self, pairs: int, device: torch.device) -> torch.Tensor:
        """Zeros, which a kernel leaves behind as it found them; kept, since graphs know their address."""
        if pairs not in self._arrived:
            self._arrived[pairs] = torch.zeros(pairs, dtype=torch.int32, device=device)
        return self._arrived[pairs]

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:  # noqa: D102
        tokens, intermediate = len(gate_up), gate_up.shape[1] // 2
        gated = gate_up.new_empty(tokens, intermediate)
        self._kernels.gate_kernel[(tokens, -(-intermediate // _COLUMNS))](
            gate_up, gated, intermediate, BLOCK=_COLUMNS, num_warps=4, **self._early
        )
        return gated

    def skip_mlp(  # noqa: D102
        self, normed: torch.Tensor, scale: torch.Tensor, mlp: KernelMlp, stream: torch.Tensor
    ) -> torch.Tensor:
        # The operators' operands are [batch, sequence, …]; which token is whose does not matter to an MLP.
        operands = normed.unsqueeze(0), scale.unsqueeze(0), mlp, stream.unsqueeze(0)
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        # A prompt's kernels work long enough to hide what is between them.
        if self._early["EARLY"] and len(normed) <= MOST_TOKENS["decode"]:
            first = {"kernel": self._kernels.early_skip_gate_up_kernel, **self._early}
            second = {"kernel": self._kernels.early_skip_down_kernel, **self._early}
        return skip_mlp(*operands, gate_up_options=first, down_options=second).squeeze(0)

    def product(self, rows: torch.Tensor, product: Product) -> torch.Tensor:  # noqa: D102
        if not self._vectors or len(rows) > 1 or product.bias is not None:
            return product(rows)
        wide, depth = product.weight.shape
        block = _power_of_two(depth)
        columns = math.gcd(vector_columns(block, rows.itemsize), wide)
        output = rows.new_empty(1, wide)
        self._kernels.vector_product_kernel[(wide // columns,)](
            rows,
            product.weight,
            depth,
            output,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=4,
            **self._early,
        )
        return output


def vector_columns(block: int, itemsize: int) -> int:
    """Columns of a program of one token's product: as many as have their weights, 64 KB, in registers of 128 threads.

    Args:
        block: Elements of a column, a power of two.
        itemsize: Bytes of an element.
    """
    return max(1, min(8, (1 << 16) // (block * itemsize)))


_COLUMNS = 1024  # of the gated products, that a program computes


def slots_of(width: int, itemsize: int) -> int:
    """Slots of the cache that a program of the attention kernel reads at a time: some of these in flight fit 99 KB.

    Args:
        width: Of a head, a power of two.
        itemsize: Bytes of an element.
    """
    return max(16, min(64, (1 << 14) // (width * itemsize)))


def _splits(programs: int, pairs: int, capacity: int, slots: int) -> int:
    """Programs among which the slots of one sequence and key head are split: a power of two, each with work to do."""
    enough = _power_of_two(-(-capacity // slots))
    return min(enough, 1 << (max(1, programs // pairs).bit_length() - 1))


def _power_of_two(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())
