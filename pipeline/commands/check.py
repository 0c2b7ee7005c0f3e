"""`millrace check MODEL`: compares this installation with transformers on a model, and looks at its tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ...engine.errors import ConfigError
from ..plain_text import without_controls
from .running import EngineSettings, engine_setting

if TYPE_CHECKING:
    from ...engine import ModelCheck

__all__ = ["check"]

MAX_SHOWN = 5
"""Most findings of a kind that are shown."""


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, GGUF file, name on a hub, or bundled:NAME.")
    ],
    *,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts: a line of text each, or JSON lines with 'prompt'.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 16,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of log-probabilities allowed.")] = 1e-3,
    reference: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The same model elsewhere, to compare with."),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Take tensors that changed since the last check as right.")
    ] = False,
    engine: EngineSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks.")] = False,
) -> None:
    """Compare this installation with transformers on a model: greedy tokens, log-probabilities, tensors."""
    from ...engine import EngineConfig, check_model

    given = dict(map(engine_setting, engine or []))
    if "model" in given:
        raise ConfigError("the model is the argument MODEL; leave it out of --engine")
    EngineConfig.check_kwargs(model=model, **given)
    if prompts is not None:
        given["prompts"] = read_prompts(prompts)
    found = check_model(model, max_tokens=max_tokens, tolerance=tolerance, reference=reference, accept=accept, **given)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found)
    raise typer.Exit(0 if found.is_good else 1)


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a file: its lines, or the fields `prompt` of its JSON lines if its name ends in .jsonl.

    Raises:
        ConfigError: The file cannot be read, or it has no prompts.
    """
    try:
        # A text may hold other ends of lines, such as U+2028, which are none in JSON lines.
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix.lower() == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"--prompts {str(path)!r} cannot be read ({error!r:.100}); pass a text file with a prompt a line, or a "
            ".jsonl file whose lines have the field 'prompt'"
        ) from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"--prompts {str(path)!r} holds no prompts, or a prompt that is no text")
    return prompts


def _show(found: ModelCheck) -> None:
    """Prints what was found, a line for each thing that was compared."""
    console = Console(soft_wrap=True, highlight=False)
    num_outputs = len(found.outputs)
    same_ids = sum(output.same_prompt_tokens for output in found.outputs)
    num_tokens = sum(output.num_tokens for output in found.outputs)
    console.print(f"{'model':<12}{escape(without_controls(found.model))} ({escape(found.architecture)})")
    console.print(f"{'tensors':<12}{found.num_tensors}; {_since(found)}")
    console.print(f"{'tokenizer':<12}the same token ids for {same_ids} of {num_outputs} prompts")
    same = num_outputs - found.num_different
    console.print(f"{'greedy':<12}the same tokens for {same} of {num_outputs} outputs, {num_tokens} tokens")
    console.print(f"{'log-probs':<12}at most {found.max_logprob_error:.2g} apart, {found.tolerance:g} is allowed")
    for output in [output for output in found.outputs if output.first_difference is not None][:MAX_SHOWN]:
        console.print(
            f"  {escape(without_controls(output.prompt[:40]))!r}: token {output.first_difference} is {output.ours}, "
            f"transformers has {output.theirs}"
        )
    for colour, sentences in (("red", [*found.damaged, *found.changed]), ("yellow", [*found.unusual, *found.skipped])):
        _list(console, colour, sentences)
    end = "this installation computes what transformers computes" if found.is_good else "look at the differences above"
    console.print(f"[{'green' if found.is_good else 'red'}]{end}[/]")


def _since(found: ModelCheck) -> str:
    if found.changed_since is None:
        return "no earlier check that was good, to say what has changed since"
    return f"{len(found.changed) or 'none'} changed since {escape(without_controls(found.changed_since))}"


def _list(console: Console, colour: str, sentences: Sequence[str]) -> None:
    for sentence in sentences[:MAX_SHOWN]:
        console.print(f"  [{colour}]{escape(without_controls(sentence))}[/]")
    if len(sentences) > MAX_SHOWN:
        console.print(f"  and {len(sentences) - MAX_SHOWN} more")
