import math

import pytest
import typer

from dlo_export.exporter.commands.numbers import finite, positive


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
