"""Our PyTorch model, which really skips, against the artefact: decode of batch 1 with the same routing.

SmolLM2-135M with a router on every layer, fitted so that every second layer runs its MLP. Both sit behind the Runner
protocol in one process, take the same tokens and decide alike; blocks of a prefill and 32 decode steps alternate.
ONNX Runtime's threads do not spin, so that they leave PyTorch's alone.

    python -m benchmarks.pytorch_speed
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.routed_artefact import export
from benchmarks.common.routing import fit_routers, layers_active, routable_model, save_routers
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workspace import temporary_folder
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.runtimes.bench import Subject, Workload, compare_speed
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.torch.runner import TorchRunner

BAR = 1.5
WORKLOAD = Workload(batch=1, prompt_tokens=128, decode_tokens=32, rounds=15, warm_up=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    tokens = distinct_tokens(WORKLOAD.prompt_tokens + WORKLOAD.decode_tokens)
    with open_checkpoint(str(smollm2_folder())) as checkpoint:
        model = routable_model(checkpoint.config.raw, checkpoint.tensors)
    fit_routers(model, tokens, layers_active(0.5, model.config.num_hidden_layers, tokens.shape[1]))
    with temporary_folder() as temporary:
        adapter = save_routers(model, temporary / "adapter")
        graph = export(smollm2_folder(), temporary / "artefact", adapter)
        runners: list[Runner] = [TorchRunner(model), OnnxRuntimeRunner(graph, threads=threads, allow_spinning=False)]
        feed = tokens[0].tolist()
        pytorch, artefact = compare_speed([Subject(runner, feed) for runner in runners], WORKLOAD)

    rows, record = [], {}
    for phase, reference, ours in (
        ("decode", pytorch.decode, artefact.decode),
        ("prefill", pytorch.prefill, artefact.prefill),
    ):
        times = {"PyTorch": Samples(reference * 1e3), "artefact": Samples(ours * 1e3)}
        speedup = times["PyTorch"] / times["artefact"]
        rows.append([phase, *times.values(), speedup, f"≥ {BAR}" if phase == "decode" else ""])
        record[phase] = {name: time.summary() for name, time in times.items()} | {"speedup": speedup.summary()}
    rate = float(np.mean(list(pytorch.active_rate.values())))
    print_report(
        f"Routed SmolLM2-135M, {rate:.0%} of MLPs active, fp32, {threads} threads",
        ["phase", "PyTorch, ms", "artefact, ms", "speed-up", "bar"],
        rows,
        {
            "dtype": "float32",
            "batch": 1,
            "prompt": WORKLOAD.prompt_tokens,
            "decode_tokens": WORKLOAD.decode_tokens,
            "rounds": WORKLOAD.rounds,
            "warm_up": WORKLOAD.warm_up,
            "active_rate": round(rate, 4),
            "milliseconds": record,
            "versions": versions("dlo-export", "onnxruntime", "torch", "transformers"),
        },
    )


if __name__ == "__main__":
    main()
