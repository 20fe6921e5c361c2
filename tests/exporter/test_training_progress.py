"""How training shows where it is when stderr is no terminal."""

import io
import re

from rich.console import Console

from dlo_export.exporter.training_progress import TrainingProgress
from dlo_export.modeling.training.reports import StepReport


def test_last_step_is_told_with_the_time_left_when_there_is_no_terminal():
    output = io.StringIO()
    with TrainingProgress(Console(file=output)) as progress:
        for step in (1, 2, 3):
            progress.show(StepReport(step=step, steps=3, loss=2.5, active=0.8, tokens_per_second=1234.5))
    line = output.getvalue()
    assert re.fullmatch(r"step 3 of 3: loss 2\.500, active 80\.0%, 1,23[45] tokens/s, 0 s left\n", line)


def test_active_rate_is_left_out_when_nothing_is_routed():
    output = io.StringIO()
    with TrainingProgress(Console(file=output)) as progress:
        progress.show(StepReport(step=1, steps=1, loss=2.5, active=None, tokens_per_second=10.0))
    assert output.getvalue() == "step 1 of 1: loss 2.500, 10 tokens/s\n"
