"""`split_reasoning`: splits a text into reasoning and answer, with the marks of each family of models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The marks around the reasoning of a family of models.

    Attributes:
        opening: Mark before the reasoning, in the text or at the end of the prompt.
        closing: Mark after the reasoning.
        always: Whether a text without either mark is reasoning that was cut off, if the prompt is not known. True for
            models that reason before every answer.
    """

    opening: str
    closing: str
    always: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Marks that detokenizing must keep in the text, although some tokenizers treat them as special tokens."""
        return self.opening, self.closing


REASONING_FORMATS = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", always=True),
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}
"""Name of a parser -> the format that it reads."""


def split_reasoning(kind: ReasoningFormat, text: str, prompt: str | None = None) -> tuple[str | None, str | None]:
    """Splits a text into its reasoning and its answer.

    Templates of many models open the reasoning at the end of the prompt, so that the text holds the closing mark only.
    A text that reached its limit of tokens inside the reasoning holds no closing mark. Later marks belong to the
    answer. The function raises no error, whatever the text is.

    Args:
        kind: Marks of the model's family.
        text: The model's text.
        prompt: The prompt that the text answers; None if it is not known as text.

    Returns:
        The reasoning and the answer, without white space around them; None for a part that is missing. A text without
        reasoning is the answer, unchanged.
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
