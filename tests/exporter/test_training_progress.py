import io

import pytest
from rich.console import Console

from dlo_export.exporter import training_progress
from dlo_export.exporter.training_progress import TrainingProgress
from dlo_export.modeling.training.trainer import StepReport


@pytest.mark.parametrize("active", [0.8125, None])
def test_progress_tells_steps_loss_rate_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, active: float | None
) -> None:
    monkeypatch.setattr(training_progress, "_LINE_SECONDS", -1.0)  # a line for every step
    written = io.StringIO()
    with TrainingProgress(Console(file=written, width=200)) as progress:
        for step in (1, 2, 4):
            progress.show(StepReport(step, 4, 2.5, active, 1234.5))
    first, second, last = written.getvalue().splitlines()
    values = f"loss 2.500{'' if active is None else ', active 81.2%'}, 1,234 tokens/s"
    assert first == f"step 1 of 4: {values}"
    assert second.startswith(f"step 2 of 4: {values}, ")
    assert second.endswith(" s left")
    assert last == f"step 4 of 4: {values}, 0 s left"
