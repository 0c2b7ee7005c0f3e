"""`check_model`: runs a model here and in transformers, compares the two, and looks at the checkpoint's tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from ..config import EngineConfig
from ..errors import ConfigError, RequestError, UnsupportedModelError, quote
from ..gguf.files import find_gguf
from ..llm import LLM
from ..loading.model_source import resolve_model
from ..models import load_hf_config
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from ..storage import Location
from .outputs import OutputCheck, compare_outputs
from .record import CheckRecord
from .reference import load_reference, local_file_or_folder, reference_hub
from .tensors import TensorFacts, changed_tensors, damaged_tensors, scan_tensors, unusual_tensors

__all__ = ["PROMPTS", "ModelCheck", "check_model"]

PROMPTS = (
    "Hello",
    "The capital of France is",
    "Count: one, two, three, four,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Größe, naïve, 水車, 🙂: words of several languages, in one line. Die Mühle steht am Bach, und das Rad dreht sich.",
    "A long prompt, of which several blocks of the cache are needed. " * 12,
    "A long prompt, of which several blocks of the cache are needed. " * 12 + "It ends in another way.",
    "Question: A wheel turns 12 times a minute. How often does it turn in an hour? Answer:",
)
"""The prompts of a check without a file of prompts: short and long ones, two of which begin alike."""

NUM_LOGPROBS = 5
"""Number of the likeliest tokens whose log-probabilities are compared."""


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """What the check of one model has found.

    Attributes:
        model: Where the model is.
        architecture: Its architecture.
        num_tensors: Number of tensors of the checkpoint.
        tolerance: Largest difference between log-probabilities that passes as rounding.
        outputs: The comparison for each prompt, twice: computed, and with the prompt found in the prefix cache.
        skipped: Sentences about prompts that could not be run, such as those that are too long for the model.
        damaged: Sentences about tensors that no trained model has.
        changed: Sentences about tensors that are not as they were.
        changed_since: What `changed` compares with: the day of the last check, or the other folder; None if there is
            nothing to compare with.
        unusual: Sentences about tensors that stand out among the layers. They may be right.
    """

    model: str
    architecture: str
    num_tensors: int
    tolerance: float
    outputs: tuple[OutputCheck, ...]
    skipped: tuple[str, ...]
    damaged: tuple[str, ...]
    changed: tuple[str, ...]
    changed_since: str | None
    unusual: tuple[str, ...]

    @property
    def max_logprob_error(self) -> float:
        """Largest difference between log-probabilities of all prompts."""
        return max((output.max_logprob_error for output in self.outputs), default=0.0)

    @property
    def num_different(self) -> int:
        """Number of outputs with a token that is not the likeliest of transformers."""
        return sum(output.first_difference is not None for output in self.outputs)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found that a user must look at."""
        same_prompts = all(output.same_prompt_tokens for output in self.outputs)
        same_outputs = not self.num_different and self.max_logprob_error <= self.tolerance
        return bool(self.outputs) and same_prompts and same_outputs and not self.damaged and not self.changed

    def as_dict(self) -> dict[str, Any]:
        """Returns all findings as JSON values."""
        return {**asdict(self), "max_logprob_error": self.max_logprob_error, "is_good": self.is_good}


def check_model(
    model: str,
    *,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 16,
    tolerance: float = 1e-3,
    reference: str | None = None,
    accept: bool = False,
    shows_progress: bool = True,
    **settings: Any,
) -> ModelCheck:
    """Compares this installation with transformers on a model: greedy tokens and log-probabilities, in float32.

    The prompts run twice, so that the second time finds them in the prefix cache. The digests of the tensors of a good
    model are kept in the user's cache folder, and the next check says which tensors have changed.

    Args:
        model: The model, as `LLM` takes it.
        prompts: The prompts.
        max_tokens: Number of tokens that are generated for each prompt.
        tolerance: Largest difference between log-probabilities that passes as rounding.
        reference: A folder with the same model, which transformers loads in place of `model`. Its tensors are compared
            with those of `model`.
        accept: Whether tensors that have changed since the last check are taken as right from now on.
        shows_progress: Whether progress bars are shown.
        **settings: Further fields of `EngineConfig`.

    Returns:
        What was found.

    Raises:
        UserError: The model cannot be loaded, here or by transformers, or it does not generate.
    """
    config = EngineConfig.from_kwargs(model=model, **{"dtype": "float32", "generation_config": "vllm", **settings})
    place = local_file_or_folder(model, config.hub)
    facts = _scan(place, shows_progress)
    earlier, since = _earlier(place, config, reference)
    architecture, outputs = _generate(config, prompts, max_tokens, shows_progress)
    accepts = accept and reference is None
    ran = [(prompt, output) for prompt, output in outputs if output.error is None]
    found = ModelCheck(
        model=model,
        architecture=architecture,
        num_tensors=len(facts),
        tolerance=tolerance,
        outputs=tuple(_compare(config, reference, ran, tolerance, shows_progress)),
        skipped=tuple(dict.fromkeys(_reason(prompt, output.error) for prompt, output in outputs if output.error)),
        damaged=tuple(damaged_tensors(facts)),
        changed=() if accepts or earlier is None else tuple(changed_tensors(facts, earlier)),
        changed_since=since,
        unusual=tuple(unusual_tensors(facts)),
    )
    if accepts or (reference is None and found.is_good):
        CheckRecord.of_today({name: of.digest for name, of in facts.items()}).save(place.url)
    return found


def _scan(place: Location, shows_progress: bool) -> dict[str, TensorFacts]:
    return dict(_bar(shows_progress)(scan_tensors(place), desc="tensors", unit="tensor"))


def _bar(shows_progress: bool) -> Callable[..., Any]:
    """Returns the function that makes progress bars, which appear after two seconds and vanish at their end."""
    return functools.partial(tqdm, delay=2, leave=False, disable=not shows_progress)


def _reason(prompt: str, error: RequestError) -> str:
    return f"{prompt[:40]!r}: {error.message}"


def _earlier(place: Location, config: EngineConfig, reference: str | None) -> tuple[dict[str, str] | None, str | None]:
    """Returns the digests with which the tensors are compared, and what they are; None and None without any."""
    if reference is None:
        record = CheckRecord.load(place.url)
        return (None, None) if record is None else (dict(record.digests), record.date)
    other = local_file_or_folder(reference, reference_hub(config, reference))
    if bool(find_gguf(place)) != bool(find_gguf(other)):
        raise ConfigError(
            f"the tensors of {quote(config.model)} and of {quote(reference)} have other names, because only one of the "
            "two is a GGUF file; give a reference of the same kind"
        )
    return {name: of.digest for name, of in scan_tensors(other)}, reference


def _generate(
    config: EngineConfig, prompts: Sequence[str], max_tokens: int, shows_progress: bool
) -> tuple[str, list[tuple[str, RequestOutput]]]:
    """Returns the architecture, and each prompt with our output, twice."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=NUM_LOGPROBS)
    with LLM(**asdict(config)) as llm:
        hf_config = load_hf_config(resolve_model(config.model, config.hub), config.hf_overrides, **config.model_code)
        if not llm.llm_engine.task.decodes:
            raise UnsupportedModelError(f"{config.model} makes vectors; the check compares models that generate text")
        outputs: list[tuple[str, RequestOutput]] = []
        for _ in range(2):
            ran = llm.generate(list(prompts), params, _bar(shows_progress), on_error="return")
            outputs += zip(prompts, ran, strict=True)
    return hf_config.architectures[0], outputs


def _compare(
    config: EngineConfig,
    reference: str | None,
    outputs: Sequence[tuple[str, RequestOutput]],
    tolerance: float,
    shows_progress: bool,
) -> list[OutputCheck]:
    """Compares our outputs with transformers, which loads the model now that ours is closed."""
    if not outputs:
        return []
    theirs, tokenizer = load_reference(config, reference)
    shown = _bar(shows_progress)(outputs, desc="transformers", unit="prompt")
    return [compare_outputs(theirs, tokenizer, prompt, output, tolerance=tolerance) for prompt, output in shown]
