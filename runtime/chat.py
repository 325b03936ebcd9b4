"""Chat templates: messages to a prompt, in the Jinja dialect of Hugging Face's ``chat_template``.

A template comes out of a model file, so it runs in Jinja's immutable sandbox: it sees the messages and a few
harmless functions, cannot reach Python's internals, and ``range`` in it is limited.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlxc.errors import FormatError, OptionError, SessionError

_MAX_CHARACTERS = 1 << 24  # of a rendered prompt: no context is that long

# What an expression in a template can raise on messages that it does not expect.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Compiles ``source``; the tokens are the model's, as text.

        Raises:
            FormatError: the template is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise FormatError(f"not a valid template: {_line(error)}", source="chat template") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt for ``messages``, each with a ``role`` and a ``content``.

        Most templates write the begin-of-text token themselves: encode a result that starts with it with
        ``add_special=False``.

        Args:
            messages: the conversation so far, oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            OptionError: a message has no role or content.
            SessionError: the template refuses the messages or fails on them.
        """
        for i, message in enumerate(messages):
            if (
                not isinstance(message, Mapping)
                or not isinstance(message.get("role"), str)
                or "content" not in message
            ):
                raise OptionError(f"message {i} needs a role and a content", source="messages")
        pieces, size = [], 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._tokens
            ):
                size += len(piece)
                if size > _MAX_CHARACTERS:
                    raise SessionError(
                        f"the prompt is longer than {_MAX_CHARACTERS} characters", source="chat template"
                    )
                pieces.append(piece)
        except _RENDER_ERRORS as error:
            raise SessionError(
                f"cannot render the messages: {_line(error)}", source="chat template"
            ) from error
        return "".join(pieces)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
