"""`one`: runs one prompt, for tests of its output."""

from __future__ import annotations

from typing import Any

from millrace.engine.llm import LLM
from millrace.engine.outputs import CompletionOutput
from millrace.engine.sampling_params import SamplingParams

PROMPT = "Hello, my name is"


def one(llm: LLM, prompt: Any = PROMPT, **params: Any) -> CompletionOutput:
    """Returns the output of one prompt, decoded greedily unless the parameters say otherwise."""
    (output,) = llm.generate([prompt], SamplingParams(**{"temperature": 0, **params}), use_tqdm=False)
    return output.outputs[0]
