"""The source text of an argument of the running call, for messages. Knows nothing of tensors."""

from __future__ import annotations

import ast
import io
import tokenize
from types import FrameType
from typing import Any

from executing import Source

__all__ = ["argument_text"]

_OPENING, _CLOSING = ("(", "[", "{", "."), (")", "]", "}", ",", ".", ":")
_LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def argument_text(frame: FrameType | None, function: Any, position: int, keyword: str) -> str | None:
    """The text of one argument of the call of ``function`` that runs in ``frame``.

    ``None`` where there is no source, or the call isn't written there (``map`` and the like call it).
    """
    if frame is None:
        return None
    try:
        execution = Source.executing(frame)
        call, source = execution.node, execution.source
        if not isinstance(call, ast.Call) or _value(call.func, frame) is not function:
            return None
        argument = _argument(call, position, keyword)
        if argument is None:
            return None
        text = ast.get_source_segment(source.text, argument)
        return None if text is None else on_one_line(text)
    except Exception:  # whatever fails here, the gradient has to come out
        return None


def _argument(call: ast.Call, position: int, keyword: str) -> ast.expr | None:
    for named in call.keywords:
        if named.arg == keyword:
            return named.value
    if len(call.args) <= position or any(isinstance(a, ast.Starred) for a in call.args[: position + 1]):
        return None
    return call.args[position]


def _value(expression: ast.expr, frame: FrameType) -> Any:
    """The value of a dotted name in ``frame``."""
    if isinstance(expression, ast.Attribute):
        return getattr(_value(expression.value, frame), expression.attr)
    if isinstance(expression, ast.Name):
        for names in (frame.f_locals, frame.f_globals, frame.f_builtins):
            if expression.id in names:
                return names[expression.id]
    raise LookupError


def on_one_line(text: str) -> str:
    """Python source without comments and line breaks, single spaces where there was space."""
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(f"({text}\n)").readline)
        if token.type not in _LAYOUT
    ][1:-1]
    parts: list[str] = []
    before = None
    for token in tokens:
        if before is not None:
            apart = token.start[0] > before.end[0] or token.start[1] > before.end[1]
            broken = token.start[0] > before.end[0]
            joined = broken and (before.string in _OPENING or token.string in _CLOSING)
            if apart and not joined:
                parts.append(" ")
        parts.append(token.string)
        before = token
    return "".join(parts)
