"""A step's operations in Triton kernels: how each is launched."""

from __future__ import annotations

import math
from typing import Any

import torch

from dlo_export.modeling.skip_kernels import KernelMlp, skip_mlp
from dlo_export.plugins.tiles import MOST_TOKENS
from dlo_export.runtimes.errors import BackendUnavailableError
from dlo_export.runtimes.torch.captured.step_ops import Decisions, Routing, StepOps
from dlo_export.runtimes.torch.captured.step_weights import Product

_PROGRAMS = 128  # that attention is split among
_COLUMNS = 1024  # of the gated products, that a program computes
_WIDE_STREAM = 4096  # of an 8B; a 1B's, 2048, wants kernels to start less early (docs/results/gpu_pytorch.md)


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
        from dlo_export.runtimes.torch.captured import attention_kernel, step_kernels  # noqa: PLC0415

        self._kernels: Any = step_kernels
        self._attention: Any = attention_kernel
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
        self._attention.attend_kernel[(batch * kv_heads, splits)](
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


def kernel_ops(embedding: torch.Tensor, batch: int) -> StepOps:
    """The kernels, overlapping as was fastest where it was measured: on an H200, with one token a step.

    Args:
        embedding: T [vocabulary, hidden], on the GPU.
        batch: Tokens of a step.

    Raises:
        BackendUnavailableError: Triton is missing.
    """
    try:
        if batch > 1 or torch.cuda.get_device_capability(embedding.device) != (9, 0):
            return KernelOps()
        return KernelOps(early=2 if embedding.shape[1] >= _WIDE_STREAM else 1, vectors=True)
    except ModuleNotFoundError as err:
        raise BackendUnavailableError(
            f"captured decode: {err.name} is missing", hint="install triton, which comes with PyTorch for CUDA"
        ) from err


def vector_columns(block: int, itemsize: int) -> int:
    """Columns of a program of one token's product: as many as have their weights, 64 KB, in registers of 128 threads.

    Args:
        block: Elements of a column, a power of two.
        itemsize: Bytes of an element.
    """
    return max(1, min(8, (1 << 16) // (block * itemsize)))


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
