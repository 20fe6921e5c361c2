"""Runs the same step of a graph again and again in onnxruntime-genai itself: prefill, or one more token greedily.

A step ends with the token that comes next, chosen as a user's program has it chosen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from benchmarks.common.workers import serve


class GenaiStep:
    """One step of batch 1 behind a cache in genai's own buffers, which are taken back to where they were before it.

    Args:
        graph: A .onnx, genai_config.json beside it.
        tokens: int64 [1, past + sequence]; the first `past` fill the cache.
        sequence: Tokens of the step.
        threads: Of the session.
    """

    def __init__(self, graph: Path, tokens: np.ndarray, sequence: int, threads: int) -> None:
        config = og.Config(str(graph.parent))
        options = json.dumps({"intra_op_num_threads": threads})
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
        self.model = og.Model(config)
        parameters = og.GeneratorParams(self.model)
        length = tokens.shape[1] + 2
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        self.generator = og.Generator(self.model, parameters)
        self.past = tokens.shape[1] - sequence
        self.step = tokens[0, self.past :]
        if self.past:
            self.generator.append_tokens(tokens[0, : self.past])

    def __call__(self) -> None:
        """Runs the step and chooses the next token; the cache's buffers stay where they are."""
        self.generator.rewind_to(self.past)
        self.generator.append_tokens(self.step)
        self.generator.generate_next_token()

    def next_token(self) -> int:
        """The last run's."""
        return int(self.generator.get_next_tokens()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path)
    parser.add_argument("tokens", type=Path, help="int64 [1, past + sequence], .npy")
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    step = GenaiStep(given.graph, np.load(given.tokens), given.sequence, given.threads)
    step()
    serve(step, {"next_token": step.next_token()})


if __name__ == "__main__":
    main()
