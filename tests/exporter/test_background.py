from __future__ import annotations

import threading

import pytest

from dlo_export.exporter.background import BackgroundValue


def test_background_value_is_computed_beside_other_work() -> None:
    asked = threading.Event()

    def compute() -> int:
        assert asked.wait(30)
        return 7

    value = BackgroundValue(compute)
    asked.set()  # a value computed in the constructor would wait for this in vain
    assert value.result() == 7
    assert value.result() == 7


def test_background_value_raises_where_it_is_asked_for_when_its_computation_failed() -> None:
    def compute() -> int:
        raise OSError("gone")

    value = BackgroundValue(compute)
    with pytest.raises(OSError, match="gone"):
        value.result()
