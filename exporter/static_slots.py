"""How many slots a cache that ONNX Runtime writes in place may have."""

from __future__ import annotations

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.runtimes.errors import BackendUnavailableError
from dlo_export.runtimes.memory import check_memory, in_words

_MOST_BYTES = 1 << 40  # of one sequence's cache: more than a machine has
_BYTES_OF_AN_ANGLE = 20  # while `SlotTables` computes: the angle, one table, the other in float64 and float32


def check_slots(source: ExportSource, slots: int, dtype: str) -> None:
    """Refuses a cache that no machine holds, before tables of its length are computed.

    Args:
        source: Of the model.
        slots: Tokens per sequence.
        dtype: Of keys and values, as an option.

    Raises:
        InputError: So.
        BackendUnavailableError: This one does not hold what its tables are computed in.
    """
    config = source.base.config
    if config is None:
        return
    token = 2 * source.num_layers * config.num_kv_heads * config.head_dim * BY_OPTION[dtype].itemsize
    if slots * token > _MOST_BYTES:
        raise InputError(
            f"{source.base.path}: --static-cache {slots}: a KV cache of so many tokens takes {slots * token >> 30} GB "
            f"per sequence, expected at most {_MOST_BYTES >> 30} GB",
            hint=f"choose --static-cache {_MOST_BYTES // token} or less",
        )
    tables = slots * config.head_dim // 2 * _BYTES_OF_AN_ANGLE
    try:
        check_memory(tables)
    except BackendUnavailableError as err:
        raise BackendUnavailableError(
            f"{source.base.path}: --static-cache {slots}: its tables of cosines and sines take {in_words(tables)} of "
            f"memory to compute, and {err.message}; the cache takes {in_words(slots * token)} per sequence",
            hint="choose fewer slots",
        ) from err


def beyond_context(source: ExportSource, slots: int) -> str | None:
    """What to tell of a cache that is longer than the model's context; None where it is not, or nobody knows."""
    config = source.base.config
    if config is None or slots <= config.max_position_embeddings:
        return None
    return (
        f"--static-cache {slots} is beyond the model's context of {config.max_position_embeddings} tokens: what it "
        "says behind them is not to be trusted"
    )
