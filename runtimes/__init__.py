"""Run artefacts: runners behind one protocol, generation, evaluation, parity."""

import os

# PyTorch's threads spin while they wait for each other. On a machine that is busy with anything else, another runtime's
# threads included, the spinning keeps the awaited one from running: 20 to 30 times slower, measured on two cores.
# OpenMP reads this once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
