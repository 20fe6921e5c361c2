"""Clients of artefacts, and how each is installed under .peers/ and called.

    python -m tests.interop.environments

installs them all, and names those that cannot be installed here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.peers import is_installed, peer_environment, requirements_of
from benchmarks.common.workspace import WORKSPACE, alone_in
from dlo_export.checkpoints.errors import MachineError

FOLDER = Path(__file__).parent
REQUIREMENTS = FOLDER / "requirements"
NPM_FOLDER = WORKSPACE / "transformers_js"
NPM_FILES = ("package.json", "package-lock.json")


@dataclasses.dataclass(frozen=True)
class Client:
    """A program that runs artefacts.

    Attributes:
        name: Of its script in clients/ and of its environment.
        requirements: What pip installs; None for the client that npm installs.
    """

    name: str
    requirements: Path | None

    @property
    def installed(self) -> bool:
        """Whether its environment is there, complete, and of these requirements."""
        if self.requirements is not None:
            return is_installed(self.name, self.requirements)
        # npm writes this file when everything is in place.
        complete = NPM_FOLDER / "node_modules" / ".package-lock.json"
        return complete.is_file() and all(
            (NPM_FOLDER / name).read_text() == (REQUIREMENTS / "transformers_js" / name).read_text()
            for name in NPM_FILES
        )

    def install(self) -> None:
        """Makes its environment.

        Raises:
            MachineError: pip failed, and has said why.
            CalledProcessError: npm did.
            FileNotFoundError: There is no npm.
        """
        if self.requirements is not None:
            peer_environment(self.name, self.requirements)
            return
        with alone_in(NPM_FOLDER):
            if self.installed:
                return
            for name in NPM_FILES:
                shutil.copyfile(REQUIREMENTS / "transformers_js" / name, NPM_FOLDER / name)
            # Scripts of packages would only download CUDA libraries; the CPU's are in the package.
            subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=NPM_FOLDER, check=True)

    def run(self, artefact: Path, **request: Any) -> dict[str, Any]:
        """Lets it generate, or tokenize where it does no more.

        Args:
            artefact: The folder.
            **request: `prompt` (text or token ids) and `new_tokens`.

        Returns:
            What the script prints: `prompt` and `tokens`, ids; else what a tokenizer gives.
        """
        result = self._finished(artefact, request)
        assert result.returncode == 0, f"{self.name}: {result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return answer

    def refusal(self, artefact: Path, **request: Any) -> str:
        """What it says to an artefact that it cannot run; arguments as above."""
        result = self._finished(artefact, request)
        assert result.returncode != 0, f"{self.name} ran it: {result.stdout[-2000:]}"
        return result.stderr

    def _finished(self, artefact: Path, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        if self.requirements is not None:
            # -P: the scripts' folder is not searched for modules, or a script would hide the package of its name.
            command = [WORKSPACE / self.name / "bin" / "python", "-P", FOLDER / "clients" / f"{self.name}.py"]
        else:
            # A module is looked for from where the script lies.
            script = shutil.copy(FOLDER / "clients" / f"{self.name}.mjs", NPM_FOLDER)
            command = ["node", script]
        return subprocess.run(
            [*command, artefact, json.dumps(request)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            # Nothing of this environment's packages.
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )


CLIENTS = {
    client.name: client
    for client in (
        Client("genai", REQUIREMENTS / "genai.txt"),
        Client("optimum", requirements_of("optimum")),
        # The oldest version whose CPU provider has these operators and computes them right.
        Client("onnxruntime_least", REQUIREMENTS / "onnxruntime_least.txt"),
        Client("transformers_js", None),
        # No PyTorch: it reads tokenizers, and runs nothing.
        Client("transformers_4", REQUIREMENTS / "transformers_4.txt"),
    )
}
EXPORTER = "mobius"
"""Of graphs, with PyTorch's own exporter beside it."""
COMPARER = "polygraphy"
"""Of a graph's outputs with saved ones; its own program is called."""
SHARDER = "deepspeed"
"""It shards a model that is trained in several processes."""
SHARDER_REQUIREMENTS = REQUIREMENTS / "deepspeed.txt"
GENERATING = [name for name in CLIENTS if name != "transformers_4"]


def main() -> None:
    """Installs what is missing; goes on where one program cannot be had."""
    installs = {client.name: client.install for client in CLIENTS.values() if not client.installed}
    installs[EXPORTER] = functools.partial(peer_environment, EXPORTER)
    installs[COMPARER] = functools.partial(peer_environment, COMPARER, REQUIREMENTS / "polygraphy.txt")
    installs[SHARDER] = functools.partial(peer_environment, SHARDER, SHARDER_REQUIREMENTS)
    for name, install in installs.items():
        try:
            install()
        except (MachineError, subprocess.CalledProcessError, FileNotFoundError) as err:
            print(f"{name}: cannot be installed here, its tests will be skipped ({err})", file=sys.stderr)


if __name__ == "__main__":
    main()
