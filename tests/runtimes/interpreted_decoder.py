"""Runs a decoder's kernels under Triton's interpreter and prints, as JSON, how far it is from its model.

A program of its own, because TRITON_INTERPRET must be set before triton is imported; its argument is a folder to use.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.kernel_ops import KernelOps
from dlo_export.runtimes.torch.captured.step_weights import StepWeights
from tests.runtimes.captured_cases import CAPACITY, LENGTHS, decoder_outputs, model_outputs, tiny_model

# 70 tokens fill more than one block of slots, so that splits have work; one of them stays empty.
CASES = {
    "ragged": (LENGTHS, 2, CAPACITY, {}),
    "vectors": ((5,), 2, CAPACITY, {}),
    "bias": (LENGTHS, 1, CAPACITY, {"attention_bias": True, "rescale": False}),
    "long": (
        (70,),
        2,
        200,
        {"kv_heads": 1, "layers": 1, "routed": (True,), "thresholds": None, "attention_bias": True},
    ),
}

OPS = {"vectors": {"vectors": True}, "long, not split": {"programs": 1}}
CASES["long, not split"] = CASES["long"]

if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for name, (lengths, steps, capacity, options) in CASES.items():
        model = tiny_model(Path(sys.argv[1]) / name, **options)
        logits, scores = model_outputs(model, lengths, steps)
        decoder = CapturedDecoder(
            StepWeights(model, kernels=True),
            batch=len(lengths),
            capacity=capacity,
            ops=KernelOps(**OPS.get(name, {})),
        )
        got, decided = decoder_outputs(decoder, lengths, steps)
        found[name] = [float((got - logits).abs().max()), float((decided - scores).abs().max())]
    json.dump(found, sys.stdout)
