"""The report that every benchmark ends with."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.common.measure import Samples, print_report


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0123456, 0.0123456], "0.0123 (0.0123 to 0.0123)"),
        ([99.94, 99.94], "99.9 (99.9 to 99.9)"),
        ([999.7, 999.7], "1,000 (1,000 to 1,000)"),
        ([39800.0, 39800.0, 61700.0], "39,800 (39,800 to 57,320)"),
        ([-1500.0], "-1,500 (-1,500 to -1,500)"),
    ],
)
def test_samples_show_thousands_as_numbers_when_they_stand_in_a_table(values: list[float], shown: str) -> None:
    assert str(Samples(np.array(values))) == shown


def test_report_is_a_table_and_one_json_line_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("Speed", ["what", "ms"], [["a step", Samples(np.array([1.5]))], ["b", 2]], {"launches": 1})
    *table, line = capsys.readouterr().out.splitlines()
    assert table == [
        "Speed",
        "",
        "| what   | ms               |",
        "| ------ | ---------------- |",
        "| a step | 1.5 (1.5 to 1.5) |",
        "| b      | 2                |",
        "",
    ]
    assert {"benchmark": "Speed", "launches": 1}.items() <= json.loads(line).items()
