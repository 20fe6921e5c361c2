"""`dlo run`: generate text with an artefact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlo_export.exporter.commands.numbers import MAX_COUNT, MAX_THREADS, finite
from dlo_export.exporter.commands.shared_options import OrtPluginLibrary, Provider, Tracebacks

if TYPE_CHECKING:
    from dlo_export.checkpoints.generation_config import GenerationConfig
    from dlo_export.runtimes.artefact.description import ArtefactDescription
    from dlo_export.runtimes.generation.generate import GenerationStats
    from dlo_export.runtimes.generation.sampling import Sampling

NAME = "run"

_NEW_TOKENS = 128


def main(
    artefact: Annotated[Path, typer.Argument(help="Folder that dlo-export wrote.")],
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer where there is a chat template.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-new-tokens",
            min=1,
            max=MAX_COUNT,
            help=f"{_NEW_TOKENS} unless given, or as many as a static cache holds.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, callback=finite, help="0 takes the most likely token; by default the model's own."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample among so many tokens; 0 for all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, callback=finite, help="Sample among this share of probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, chat template or not.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="Of ONNX Runtime.")] = None,
    provider: Provider = None,
    trt: Annotated[
        bool, typer.Option("--trt", help="Run the TensorRT engine; it does not tell its active rate.")
    ] = False,
    trt_plugin_library: Annotated[
        Path | None, typer.Option(help="libdlo_plugins.so the engine was built with.")
    ] = None,
    ort_plugin_library: OrtPluginLibrary = None,
    verify: Annotated[bool, typer.Option("--verify", help="First compare all files with their hashes.")] = False,
    verbose: Tracebacks = False,
) -> None:
    """Generate text: tokens stream to stdout, speed and active rate go to stderr."""
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415
    from dlo_export.checkpoints.generation_config import GenerationConfig  # noqa: PLC0415
    from dlo_export.exporter.artefact_check import open_description  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.artefact_runner import open_artefact, open_engines  # noqa: PLC0415
    from dlo_export.runtimes.artefact.description import load_description, mean_active_rates  # noqa: PLC0415
    from dlo_export.runtimes.generation.generate import Generation  # noqa: PLC0415
    from dlo_export.runtimes.generation.tokenizer import Tokenizer  # noqa: PLC0415

    del verbose
    if trt_plugin_library is not None and not trt:
        raise InputError("--trt-plugin-library is of an engine, but --trt is not given", hint="add --trt")
    if provider is not None and trt:
        raise InputError(f"--provider {provider} is of ONNX Runtime, --trt runs an engine", hint="leave one out")
    description = open_description(artefact) if verify else load_description(artefact)
    generation_config = GenerationConfig.from_folder(artefact)
    sampling = _sampling(generation_config, temperature, top_k, top_p, seed)
    tokenizer = Tokenizer(artefact)
    chat = tokenizer.has_chat_template and not raw
    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
    most = _fitting(artefact, description, len(ids), max_new_tokens, trt=trt)
    context = generation_config.context_length
    if context is not None and len(ids) + most > context:
        typer.echo(
            f"warning: a prompt of {len(ids)} tokens and up to {most} new ones go beyond the model's context "
            f"of {context}: what it says there is not to be trusted",
            err=True,
        )
    opened = (
        open_engines(artefact, trt_plugin_library)
        if trt
        else open_artefact(artefact, threads=threads, plugin_library=ort_plugin_library, provider=provider)
    )
    with opened as runner:
        generation = Generation(
            runner,
            [ids],
            max_new_tokens=most,
            end_tokens=generation_config.eos_token_id,
            sampling=sampling,
        )
        text = tokenizer.stream()
        for tokens in generation:
            if (token := tokens[0]) is not None:
                sys.stdout.write(text.add(token))
                sys.stdout.flush()
        sys.stdout.write(text.finish() + "\n")
    _report(generation.stats, mean_active_rates(description, generation.stats.active_rate))


def _fitting(
    artefact: Path, description: ArtefactDescription, prompt_tokens: int, asked: int | None, *, trt: bool
) -> int:
    """How many tokens to generate at most: as many as asked for, else of the usual number what the cache holds.

    Raises:
        InputError: The cache does not hold what was asked for, or not the prompt: nothing is begun that would end with
            it full.
    """
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415
    from dlo_export.exporter.artefact_runner import held_tokens  # noqa: PLC0415

    if trt:
        option, slots = "--trt-max-cache", min((engine.max_cache for engine in description.engines), default=None)
    else:
        option, slots = "--static-cache", held_tokens(description)
    most = asked or _NEW_TOKENS
    # The last new token is never fed.
    if slots is None or prompt_tokens + most - 1 <= slots:
        return most
    room = slots - prompt_tokens + 1
    if room < 1:
        raise InputError(
            f"{artefact}: the prompt has {prompt_tokens} tokens, its static cache holds {slots}",
            hint=f"give a shorter prompt, or export with {option} {prompt_tokens + most - 1} or more",
        )
    if asked is not None:
        raise InputError(
            f"{artefact}: a prompt of {prompt_tokens} tokens and {asked} new ones, its static cache holds {slots}",
            hint=f"give -n {room} or less, or export with {option} {prompt_tokens + asked - 1} or more",
        )
    typer.echo(
        f"warning: the static cache holds {slots} tokens, {prompt_tokens} of them the prompt's: {room} new ones at "
        f"most, not {_NEW_TOKENS}",
        err=True,
    )
    return room


def _sampling(
    model: GenerationConfig, temperature: float | None, top_k: int | None, top_p: float | None, seed: int
) -> Sampling:
    """What was asked for, else what the model's generation_config.json says; greedy where neither says anything."""
    from dlo_export.runtimes.generation.sampling import Sampling  # noqa: PLC0415

    if model.repetition_penalty != 1:
        typer.echo(
            f"warning: generation_config.json asks for repetition_penalty {model.repetition_penalty}, "
            "which is not applied here",
            err=True,
        )
    own = (model.temperature, model.top_k, model.top_p) if model.do_sample else (0.0, 0, 1.0)
    asked = (temperature, top_k, top_p)
    chosen = [default if given is None else given for given, default in zip(asked, own, strict=True)]
    return Sampling(temperature=chosen[0], top_k=int(chosen[1]), top_p=chosen[2], seed=seed)


def _report(stats: GenerationStats, active_rates: dict[str, float | None]) -> None:
    lines = [
        f"{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new ones at "
        f"{stats.tokens_per_second:.1f} tokens/s"
    ]
    if stats.active_rate:
        lines += [f"active, {kind} layers: {rate:.1%}" for kind, rate in active_rates.items() if rate is not None]
    typer.echo("\n".join(lines), err=True)
