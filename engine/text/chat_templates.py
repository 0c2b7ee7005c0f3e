"""`ChatTemplates`: renders conversations with chat templates as transformers does, within the limits of a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

from jinja2 import Template, TemplateSyntaxError

from .template_sandbox import TemplateSandbox

__all__ = ["ChatTemplates"]

MAX_TEMPLATES = 64
"""Most chat templates that are kept in compiled form; each row of a dataset may bring a template."""


MAX_TEMPLATE_CHARS = 1 << 17
"""Most characters of a chat template; those of models have a few thousand."""


class ChatTemplates:
    """Compiles chat templates and renders conversations with them."""

    def __init__(self) -> None:
        from transformers.utils import chat_template_utils as theirs

        self._sandbox = TemplateSandbox(theirs._compile_jinja_template("").environment)
        self._compile = lru_cache(MAX_TEMPLATES)(self._sandbox.from_string)
        # All of the rendering is transformers' own, but for the function that compiles a template.
        name, code = "_compile_jinja_template", theirs.render_jinja_template.__code__
        assert name in code.co_names, "this version of transformers compiles templates in another place"
        self._render = FunctionType(code, {**vars(theirs), name: self._compiled})
        self._render.__defaults__ = theirs.render_jinja_template.__defaults__

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """Renders a conversation.

        Args:
            template: Jinja text.
            messages: The conversation. Fields that are None are left out.
            **variables: Arguments of transformers' `apply_chat_template`, and variables of the template.

        Returns:
            The prompt.

        Raises:
            Exception: Any error of Jinja or of the template; a limit of the sandbox is an error of Jinja.
        """
        present = [{name: value for name, value in message.items() if value is not None} for message in messages]
        with self._sandbox.metered():
            return self._render([present], chat_template=template, **variables)[0][0]

    def _compiled(self, template: str) -> Template:
        if len(template) > MAX_TEMPLATE_CHARS:
            raise TemplateSyntaxError(f"it has more than {MAX_TEMPLATE_CHARS:,} characters", 1)
        return self._compile(template)
