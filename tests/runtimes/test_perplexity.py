import numpy as np
import pytest

from dlo_export.runtimes.perplexity import PerplexityError, measure_perplexity
from dlo_export.runtimes.runner import Runner, StepResult


class UniformRunner(Runner):
    """Predicts every one of four tokens alike, in exact arithmetic; every second token is active."""

    def __init__(self):
        super().__init__("uniform", num_layers=1, routed_layers=(0,))

    def _empty_cache(self, batch):
        pass

    def _compute(self, request):
        scores = (request.position_ids % 2).astype(np.float32)
        return StepResult(np.zeros((*request.input_ids.shape, 4), np.float32), {0: scores}, {})

    def _free(self):
        pass


def test_perplexity_is_the_number_of_choices_when_all_are_as_likely():
    measured = measure_perplexity(UniformRunner(), np.zeros((3, 8), np.int64))
    assert measured.perplexity == pytest.approx(4.0)
    assert measured.predicted_tokens == 3 * 7
    assert measured.active_rate == {0: 0.5}


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_perplexity_is_refused_when_nothing_can_be_predicted(shape):
    with pytest.raises(PerplexityError):
        measure_perplexity(UniformRunner(), np.zeros(shape, np.int64))
