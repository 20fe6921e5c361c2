"""Someone else's graph: optimum's export of SmolLM2-135M, deepened and routed by an adapter, against PyTorch.

optimum exports the model in an environment of its own (opset 18, decomposed attention and norms). `dlo-export
model.onnx --adapter` puts six TLI layers (one after every five, zero_out) and a router on each of the 36 layers into
that graph; the same adapter goes on the checkpoint, for our own graph and for the PyTorch model. Masked and compact
lowering of both graphs must give PyTorch's logits within 5e-4 and every one of its decisions, where a text is fed at
once, token by token behind a cache, and left-padded in a batch. Each router but the first skips a tenth of the
tokens, each layer others.

    python -m benchmarks.optimum_graph
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import print_report, versions
from benchmarks.peers import peer_environment
from benchmarks.routed_artefact import export
from benchmarks.routing import fit_routers, routable_model, router_tensors, tokens_active
from benchmarks.smollm2 import distinct_tokens, legacy_smollm2_folder, smollm2_folder
from benchmarks.workspace import WORKSPACE
from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expanded_config, expanded_tensors, expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.runtimes.parity.cases import Case, step_feeds
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.torch.runner import TorchRunner

BAR = 5e-4
TOKENS, SHORTER = 48, 31
ACTIVE = 0.9


def export_with_optimum(model: Path, output: Path) -> Path:
    """Runs optimum in its own environment; returns the graph.

    Raises:
        CalledProcessError: It failed; it has said why.
    """
    command = [str(peer_environment("optimum") / "optimum-cli"), "export", "onnx", "-m", str(model)]
    subprocess.run([*command, "--task", "text-generation-with-past", str(output)], check=True, stdout=sys.stderr)
    return output / "model.onnx"


def deepened_and_routed(tokens: np.ndarray, adapter_folder: Path) -> LlamaDloForCausalLM:
    """The PyTorch model, 36 layers, all routed; writes what makes it of the checkpoint as an adapter."""
    with open_checkpoint(str(smollm2_folder())) as checkpoint:
        plan = placements("tli", checkpoint.config.num_layers, every=5, init="zero_out")
        config = checkpoint.config.raw | expanded_config(checkpoint.config.raw, plan)
        model = routable_model(config, expanded_tensors(checkpoint.tensors, plan))
        wanted = tokens_active(ACTIVE, plan.num_layers, tokens.shape[1])
        wanted[0] = True  # the first MLP makes the embeddings usable, and skipping it magnifies rounding
        fit_routers(model, tokens, wanted)
        layers = expansion_adapter(checkpoint.tensors, plan)
        adapter = dataclasses.replace(
            layers, is_dlo=(True,) * plan.num_layers, tensors={**layers.tensors, **router_tensors(model)}
        )
        save_adapter(adapter, adapter_folder, overwrite=True)
    return model


def text_cases(tokens: np.ndarray) -> list[Case]:
    """The same text three ways; the shorter of the batch is its beginning, so routers know every token's stream."""
    whole, beginning = tokens[0], tokens[0, :SHORTER]
    return [
        Case("at once", step_feeds([whole])),
        Case("token by token", step_feeds([whole], *[1] * (TOKENS // 2))),
        Case("left-padded batch, cached", step_feeds([whole, beginning], 1, 1, 1, 1)),
    ]


def run(runner: Runner, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logits [real tokens, vocabulary] and decisions [routed layers, real tokens]."""
    runner.reset(case.batch)
    results = [runner.step(feed.input_ids, feed.attention_mask, feed.position_ids) for feed in case.feeds]
    logits = np.concatenate([result.logits for result in results], axis=1)
    layers = runner.routed_layers
    scores = np.concatenate([np.stack([result.router_scores[i] for i in layers]) for result in results], axis=2)
    return logits[case.real], scores[:, case.real] > 0.5


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tokens = distinct_tokens(TOKENS)
    rows, record, missed = [], [], False
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        folder = Path(temporary)
        graphs = {"optimum": export_with_optimum(legacy_smollm2_folder(), folder / "optimum"), "ours": smollm2_folder()}
        model = deepened_and_routed(tokens, folder / "adapter")
        cases = text_cases(tokens)
        with TorchRunner(model) as reference:
            expected = [run(reference, case) for case in cases]
        for origin, source in graphs.items():
            for lowering in ("masked", "compact"):
                artefact = export(source, folder / "artefact", folder / "adapter", lowering).parent
                with open_artefact(artefact, allow_spinning=False) as runner:
                    for case, (logits, decisions) in zip(cases, expected, strict=True):
                        found_logits, found_decisions = run(runner, case)
                        difference = float(np.abs(found_logits - logits).max())
                        flips = int((found_decisions != decisions).sum())
                        missed |= difference > BAR or flips > 0
                        rows.append([origin, lowering, case.name, f"{difference:.1e}", f"{flips} of {decisions.size}"])
                        record.append(
                            {
                                "graph": origin,
                                "lowering": lowering,
                                "case": case.name,
                                "largest_difference": difference,
                                "flips": flips,
                                "decisions": decisions.size,
                                "active_rate": round(float(decisions.mean()), 4),
                            }
                        )
    print_report(
        f"Deepened and routed SmolLM2-135M against PyTorch, fp32; bar: difference ≤ {BAR}, no flip",
        ["graph", "lowering", "text", "largest logit difference", "decisions that differ"],
        rows,
        {
            "dtype": "float32",
            "layers": model.config.num_hidden_layers,
            "tokens": TOKENS,
            "rows": record,
            "versions": versions("dlo-export", "onnxruntime", "torch", "transformers"),
        },
    )
    if missed:
        sys.exit("a graph misses the bar")


if __name__ == "__main__":
    main()
