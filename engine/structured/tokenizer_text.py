"""`tokenizer_text`: a tokenizer in the form that llguidance reads, in which the name of a special token is plain text.

llguidance looks up the tokens of a text that must come next with the tokenizer itself. That finds special tokens in the
text, and no grammar allows them: neither a choice nor a string could hold the text "</s>".
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["tokenizer_text"]

MARK = "\ue000"
"""Letter in front of the new names; it is reserved for private use, so that no text has it."""


def tokenizer_text(backend: Any) -> str:
    """Returns a tokenizer of the library tokenizers as JSON text, with names of special tokens that no text contains.

    Args:
        backend: The tokenizer, a `tokenizers.Tokenizer`.
    """
    content = json.loads(backend.to_str())
    content["padding"] = content["truncation"] = None
    model = content["model"]
    merged = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", ())}
    special = {token["content"] for token in content["added_tokens"] if token["special"]} - merged
    for token in content["added_tokens"]:
        token["content"] = _renamed(token["content"], special)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_renamed(name, special): token_id for name, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[_renamed(name, special), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = _renamed(model["unk_token"], special)
    return json.dumps(content)


def _renamed(name: str, special: set[str]) -> str:
    return MARK + name if name in special else name
