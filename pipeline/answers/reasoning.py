"""A model's thoughts and its answer, told apart: where a family's reasoning begins and ends in the text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How the models of a family mark their reasoning.

    Attributes:
        opening: What it begins with, in the text or already at the end of the prompt.
        closing: What it ends with.
        always: Whether a text without either mark is reasoning that was cut off, where the prompt is not known. It is
            for models that think before every answer.
    """

    opening: str
    closing: str
    always: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """What the text must still hold to be split: some tokenizers count these as special tokens."""
        return self.opening, self.closing


REASONING_FORMATS = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", always=True),
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}
"""Name of a parser -> the format it reads."""


def split_reasoning(kind: ReasoningFormat, text: str, prompt: str | None = None) -> tuple[str | None, str | None]:
    """Splits a text into its reasoning and its answer.

    Templates of many models open the reasoning at the end of the prompt, so that the text holds the closing mark only.
    A text that reached its limit of tokens while the model still thought holds no closing mark. Marks further on in a
    text are the text's own.

    Args:
        kind: The family's format.
        text: What the model wrote; no text raises.
        prompt: What it wrote it after; None if that is not known as text.

    Returns:
        The reasoning and the answer, without the white space around them; None for what is not there. A text without
        reasoning is the answer as it is.
    """
    is_open = kind.always if prompt is None else prompt.rstrip().endswith(kind.opening)
    head, closing, answer = text.partition(kind.closing)
    before, opening, inside = head.partition(kind.opening)
    if opening and not before.strip():
        head, is_open = inside, True
    elif opening and not is_open:
        return None, text
    if closing:
        return head.strip() or None, answer.strip() or None
    return (head.strip() or None, None) if is_open else (None, text)
