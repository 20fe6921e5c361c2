"""Decodes the same token behind the same prompt again and again in llama.cpp, by its C interface.

It runs in an environment of its own, `peer_environment("llama_cpp")`. Weights as the file has them, or requantised to
Q4_0, whose rows llama.cpp rearranges at load for the CPU it runs on: its fastest 4 bits there.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.common.workers import serve


class LlamaCppStep:
    """One decode step of batch 1 on a context of its own.

    Args:
        gguf: Model file.
        tokens: int64 [1, past + 1]; the first `past` fill the cache.
        threads: Of decode and prefill.

    Raises:
        RuntimeError: llama.cpp cannot load the file, or a step fails.
    """

    def __init__(self, gguf: Path, tokens: np.ndarray, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{gguf}: llama.cpp cannot load it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = 2 * tokens.shape[1], tokens.shape[1]
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.past = tokens.shape[1] - 1
        self._decode(_batch(tokens[0, : self.past], 0))
        self.step = _batch(tokens[0, self.past :], self.past)

    def __call__(self) -> None:
        """Runs the step; what it left in the cache is taken out again, which moves nothing."""
        self._decode(self.step)
        llama_cpp.llama_memory_seq_rm(self.memory, 0, self.past, -1)

    def logits(self) -> np.ndarray:
        """Of the last run: float32 [vocabulary]."""
        count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (count,)).copy()

    def _decode(self, batch: llama_cpp.llama_batch) -> None:
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gives {code}")
        llama_cpp.llama_synchronize(self.context)


def requantise(gguf: Path, output: Path) -> Path:
    """Writes the model with its matrices in Q4_0, unless it is there already.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    if not output.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        if code := llama_cpp.llama_model_quantize(str(gguf).encode(), str(output).encode(), options):
            raise RuntimeError(f"llama_model_quantize gives {code}")
    return output


def _batch(tokens: np.ndarray, start: int) -> llama_cpp.llama_batch:
    """Tokens of sequence 0 from a position on; the last one's logits are asked for."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens.tolist()):
        batch.token[index], batch.pos[index] = token, start + index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = index == len(tokens) - 1
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokens", type=Path, help="int64 [1, past + 1], .npy")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--q4-0", type=Path, help="requantise into this file first")
    given = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    gguf = given.gguf if given.q4_0 is None else requantise(given.gguf, given.q4_0)
    step = LlamaCppStep(gguf, np.load(given.tokens), given.threads)
    step()
    system = llama_cpp.llama_print_system_info().decode()
    serve(step, {"next_token": int(step.logits().argmax()), "bytes": gguf.stat().st_size, "system": system})


if __name__ == "__main__":
    main()
