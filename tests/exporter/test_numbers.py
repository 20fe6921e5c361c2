import math

import pytest
import typer

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.commands.numbers import byte_count, finite, positive


@pytest.mark.parametrize("value", [None, 0.0, -1.5, 1e308, 5e-324])
def test_number_is_given_back_when_finite(value):
    assert finite(value) is value


@pytest.mark.parametrize("check", [finite, positive])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_is_refused_when_not_finite(check, value):
    with pytest.raises(typer.BadParameter, match=f"^{value} is not a finite number$"):
        check(value)


@pytest.mark.parametrize("value", [0.0, -0.0, -5e-324])
def test_number_is_refused_when_not_above_zero(value):
    with pytest.raises(typer.BadParameter, match=f"^{value} is not above zero$"):
        positive(value)


@pytest.mark.parametrize("value", [None, 5e-324, 1.0])
def test_number_is_given_back_when_above_zero(value):
    assert positive(value) is value


@pytest.mark.parametrize(("text", "expected"), [("1", 1), ("20 kb", 20_000), ("4GiB", 4 << 30), ("1.5MB", 1_500_000)])
def test_size_is_counted_in_bytes_when_it_has_a_unit(text, expected):
    assert byte_count("--size", text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "1e3", "kB", "0.1", "2 XB", "9" * 16])
def test_size_is_refused_with_what_is_taken_when_it_is_none(text):
    with pytest.raises(InputError, match=rf"--size {text}: is no size, expected one byte or more") as error:
        byte_count("--size", text)
    assert "at most 15 digits" in error.value.hint
