"""A checkpoint's chat template, rendered as vLLM renders it, without transformers.

The environment and its helpers are those that transformers gives to chat templates, so that a template written for
it makes the same text here.
"""

from __future__ import annotations

import copy
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2.parser import Parser

ContentFormat = Literal["string", "parts"]
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateRefused(ValueError):  # noqa: N818 - named for what happened
    """The template cannot make a prompt out of this chat; the message is the template's own."""


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        self._environment = _environment()
        self._template = self._environment.from_string(source)
        self._source = source
        self.knows_developers = '"developer"' in source or "'developer'" in source
        self.content_format: ContentFormat = (
            "parts" if _loops_over_content(self._environment.parse(source)) else "string"
        )
        """Whether it wants a message's content as text or as the list of its parts."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Make the prompt's text.

        Args:
            messages: the conversation, in the form of :attr:`content_format`.
            continue_final_message: leave the last message open, for the model to go on with.
            variables: what else the template may use: ``tools``, special tokens, ``add_generation_prompt``...

        Raises:
            TemplateRefused: the template raised, or the last message cannot be continued.
        """
        if not messages:
            raise TemplateRefused("a chat needs at least one message")
        if continue_final_message:
            if variables.get("add_generation_prompt"):
                raise TemplateRefused(
                    "continue_final_message and add_generation_prompt exclude each other"
                )
            messages = _with_open_end(messages)
        try:
            text = self._template.render(messages=messages, **variables)
        except jinja2.TemplateError as error:
            raise TemplateRefused(str(error)) from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            # what the template does with a field of an unexpected kind; its text may hold the prompt
            raise TemplateRefused("the chat template cannot read this chat") from error
        return _cut_at_open_end(text) if continue_final_message else text


def load_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return a checkpoint's templates by name; the usual one is ``default``, and there may be none."""
    given = tokenizer_config.get("chat_template")
    templates = (
        {entry["name"]: entry["template"] for entry in given}
        if isinstance(given, list)
        else ({"default": given} if given else {})
    )
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    return templates | {
        name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()
    }


def _with_open_end(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    last = dict(copy.deepcopy(messages[-1]))
    content = last.get("content")
    if isinstance(content, list):
        texts = [part for part in content if "text" in part]
        if not texts:
            raise TemplateRefused("the last message has no text to continue")
        texts[-1]["text"] += _CONTINUE_TAG
    elif isinstance(content, str):
        last["content"] = content + _CONTINUE_TAG
    else:
        raise TemplateRefused("the last message has no content to continue")
    return [*messages[:-1], last]


def _cut_at_open_end(text: str) -> str:
    end = text.rfind(_CONTINUE_TAG.strip())
    if end < 0:
        raise TemplateRefused("the chat template leaves out the message to be continued")
    keeps_spaces = text.startswith(_CONTINUE_TAG, end)
    return text[:end] if keeps_spaces else text[:end].rstrip()


class _Generation(Extension):
    """``{% generation %}`` marks what a model wrote, for training; the text is the same."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)  # noqa: DTZ005 - the engine's, in its own time zone

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _loops_over_content(tree: nodes.Template) -> bool:
    """Tell whether a template goes through the parts of a message's content; vLLM decides by the same signs."""
    messages = _aliases(tree, "messages")
    loop_variables = {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and _reads(loop.iter, messages)
    }
    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        names = _content_arguments(tree, macro, loop_variables)
        in_macros |= {id(loop): names for loop in macro.find_all(nodes.For)}
    for loop in tree.find_all(nodes.For):
        if _reads(loop.iter, loop_variables, "content"):
            return True
        if isinstance(loop.iter, nodes.Name) and loop.iter.name in in_macros.get(
            id(loop), {"content"}
        ):
            return True
    return False


def _content_arguments(tree: nodes.Template, macro: nodes.Macro, messages: set[str]) -> set[str]:
    """Return the parameters of a macro that get a message's content in some call."""
    parameters = [argument.name for argument in macro.args]
    found = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        given = [*zip(parameters, call.args, strict=False)]
        given += [(each.key, each.value) for each in call.kwargs if each.key in parameters]
        found |= {name for name, value in given if _reads(value, messages, "content")}
    return found


def _aliases(tree: nodes.Template, name: str) -> set[str]:
    """Return ``name`` and every variable that it, or a slice or filter of it, is assigned to."""
    names, size = {name}, 0
    while size != len(names):
        size = len(names)
        names |= {
            each.target.name
            for each in tree.find_all(nodes.Assign)
            if isinstance(each.target, nodes.Name) and _reads(each.node, names)
        }
    return names


def _reads(node: nodes.Node | None, names: set[str], key: str | None = None) -> bool:
    """Tell whether an expression is one of ``names``, or its ``key``, perhaps filtered or sliced."""
    match node:
        case nodes.Filter() | nodes.Test():
            return _reads(node.node, names, key)
        case nodes.Getitem(arg=nodes.Slice()):
            return _reads(node.node, names, key)
        case nodes.Name():
            return key is None and node.ctx == "load" and node.name in names
        case nodes.Getitem(arg=nodes.Const(value=value)):
            return key is not None and value == key and _reads(node.node, names)
        case nodes.Getattr():
            return key is not None and node.attr == key and _reads(node.node, names)
    return False
