import numpy as np
import pytest
import torch

from dlo_export.modeling.perplexity import perplexity, score_array, score_hidden_states, score_tokens


def test_losses_are_those_of_float64_when_there_are_several_pieces_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(700, 8, generator=generator), torch.randn(5000, 8, generator=generator)
    targets = torch.randint(0, 5000, (700,), generator=generator)
    logits = hidden @ head.T
    exact = torch.log_softmax(logits.double(), -1)
    wanted, likeliest = -exact.gather(1, targets[:, None])[:, 0], exact.argmax(-1)
    targets[::2] = likeliest[::2]
    wanted[::2] = -exact.amax(-1)[::2]
    arrays = score_array(logits.numpy(), targets.numpy())
    for losses, most_likely in (
        score_tokens(logits, targets),
        score_hidden_states(lambda rows: rows @ head.T, hidden, targets, 5000),
        (torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])),
    ):
        assert losses.dtype == torch.float64
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(most_likely, likeliest == targets)


def test_losses_are_taken_in_float32_when_logits_have_16_bits() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([1, 2, 3])
    assert torch.equal(score_tokens(logits, targets).losses, score_tokens(logits.float(), targets).losses)


def test_perplexity_is_infinite_when_float64_cannot_hold_it() -> None:
    assert perplexity(7_100.0, 10) == float("inf")
    assert perplexity(20.0, 10) == pytest.approx(np.exp(2))
