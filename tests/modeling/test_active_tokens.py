"""Rows of some tokens: gathered, or computed for all and discarded; both put the same values in the same places."""

import pytest
import torch

from dlo_export.modeling.active_tokens import ActiveTokens, MaskedTokens, every_token

MIXED = torch.tensor([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("active", [MIXED, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)])
def test_rows_come_back_to_their_tokens(active: torch.Tensor) -> None:
    values = torch.arange(12.0).reshape(2, 3, 2)
    expected = torch.where(active.unsqueeze(-1), values * 10, values)
    for tokens, count in ((ActiveTokens(active), int(active.sum())), (MaskedTokens(active), active.numel())):
        rows = tokens.gather(values)
        assert len(rows) == count
        torch.testing.assert_close(tokens.put(rows * 10, values), expected)
        torch.testing.assert_close(tokens.spread(rows), values * active.unsqueeze(-1))


def test_discarded_infinities_do_not_come_through() -> None:
    values = torch.zeros(2, 3, 2)
    rows = torch.full((6, 2), torch.inf)
    put = MaskedTokens(MIXED).put(rows, values)
    assert put[~MIXED].eq(0).all()
    assert put[MIXED].isinf().all()


def test_every_token_is_a_row_when_all_are_asked_for() -> None:
    values = torch.arange(12.0).reshape(2, 3, 2)
    torch.testing.assert_close(every_token(values).gather(values), values.reshape(6, 2))
