"""Times kernels on a GPU by CUDA graphs whose launches rotate over more weights than the cache holds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Launch = Callable[..., None]
Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one of what was timed, over replays of a graph.

    Attributes:
        median_us: Of the replays' means.
        least_us: The fastest replay's mean.
        most_us: The slowest replay's mean.
    """

    median_us: float
    least_us: float
    most_us: float

    @property
    def facts(self) -> dict[str, float]:
        """For a row."""
        return {name: round(value, 2) for name, value in dataclasses.asdict(self).items()}


def timed(launches: Sequence[Step], replays: int, rounds: int = 1, of: int | None = None) -> Timing:
    """Captures launches in one graph and replays it.

    Args:
        launches: One after the other; each with weights of its own where a cache would tell otherwise.
        replays: Measured ones, after 3 that are not.
        rounds: How often the sequence stands in the graph.
        of: How many of what is timed the sequence holds; by default as many as launches.
    """
    import torch  # noqa: PLC0415 - heavy

    for launch in launches:  # compiles, loads, makes handles
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    for _ in range(3):
        graph.replay()
    events = [(_event(), _event()) for _ in range(replays)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    each = [1000 * start.elapsed_time(stop) / (rounds * (of or len(launches))) for start, stop in events]
    return Timing(statistics.median(each), min(each), max(each))


def _event() -> Any:
    import torch  # noqa: PLC0415 - heavy

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Operands of one size, with several copies of the weights.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        x: T [1, tokens, hidden].
        scale: float32 [1, tokens].
        residual: T [1, tokens, hidden].
        gated: T [1, tokens, intermediate], written.
        output: T [1, tokens, hidden], written.
        weights: (gate, up, down) of each copy.
    """

    hidden: int
    intermediate: int
    x: Any
    scale: Any
    residual: Any
    gated: Any
    output: Any
    weights: list[tuple[Any, Any, Any]]

    @property
    def weight_bytes(self) -> int:
        """Of one copy."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights[0])

    @property
    def active(self) -> int:
        """Tokens that are not skipped."""
        return int((self.scale != 0).sum())

    def gate_up(self, launch: Launch) -> list[Step]:
        """SkipGateUp with each copy."""
        return [partial(launch, self.x, self.scale, gate, up, self.gated) for gate, up, _ in self.weights]

    def down(self, launch: Launch) -> list[Step]:
        """SkipDown with each copy."""
        return [
            partial(launch, self.gated, self.scale, down, self.residual, self.output) for _, _, down in self.weights
        ]

    def both(self, gate_up: Launch, down: Launch) -> list[Step]:
        """One after the other with each copy."""
        return [step for pair in zip(self.gate_up(gate_up), self.down(down), strict=True) for step in pair]

    def products(self, rows: int, transposed: bool) -> list[Step]:
        """PyTorch's three products of so many dense rows with each copy.

        Args:
            rows: Of the operands.
            transposed: The same bytes as weights [out, in], as Hugging Face stores them, in place of [in, out].
        """
        import torch  # noqa: PLC0415 - heavy

        x = self.x[0, :1].expand(rows, -1).contiguous()
        wide = self.x.new_empty(rows, self.intermediate).normal_()
        gate_out, up_out = torch.empty_like(wide), torch.empty_like(wide)
        down_out = torch.empty_like(x)

        def form(weight: Any) -> Any:
            return weight.view(weight.shape[1], weight.shape[0]).t() if transposed else weight

        steps: list[Step] = []
        for gate, up, down in self.weights:
            steps += [partial(torch.mm, x, form(weight), out=out) for weight, out in ((gate, gate_out), (up, up_out))]
            steps.append(partial(torch.mm, wide, form(down), out=down_out))
        return steps


def layer(hidden: int, intermediate: int, tokens: int, active: float, dtype: str, copies: int) -> Layer:
    """Random operands on the device; `active` of the tokens, evenly spread, are not skipped."""
    import torch  # noqa: PLC0415 - heavy

    kind = getattr(torch, dtype)

    def values(*shape: int, divisor: float = 1.0) -> Any:
        return torch.empty(shape, dtype=kind, device="cuda").normal_(std=1 / divisor)

    index = torch.arange(tokens, device="cuda")
    chosen = ((index + 1) * active).floor() > (index * active).floor()
    scale = torch.where(chosen, 0.7, 0.0).to(torch.float32).reshape(1, tokens)
    weights = [
        (
            values(hidden, intermediate, divisor=hidden**0.5),
            values(hidden, intermediate, divisor=hidden**0.5),
            values(intermediate, hidden, divisor=intermediate**0.5),
        )
        for _ in range(copies)
    ]
    x, residual = values(1, tokens, hidden), values(1, tokens, hidden)
    gated, output = values(1, tokens, intermediate), values(1, tokens, hidden)
    return Layer(hidden, intermediate, x, scale, residual, gated, output, weights)


def read_rate(replays: int) -> float:
    """Bytes read per second by a large sum on the device: nothing is written."""
    import torch  # noqa: PLC0415 - heavy

    source = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    total = torch.empty((), dtype=torch.float32, device="cuda")
    return 2**30 / (timed([partial(torch.sum, source, dim=0, out=total)], replays).median_us * 1e-6)


def product_rate(replays: int) -> float:
    """FLOP/s of a large product in bfloat16."""
    import torch  # noqa: PLC0415 - heavy

    a, b = (torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / (timed([partial(torch.mm, a, b, out=out)], replays).median_us * 1e-6)


def least_kernel(replays: int) -> Timing:
    """A kernel that does next to nothing, after another: what a graph asks for each."""
    import torch  # noqa: PLC0415 - heavy

    return timed([partial(torch.zeros(1, device="cuda").add_, 1)], replays, rounds=40)
