"""Chats become tokens, through their target's chat template; the assistant's tokens are the ones to learn.

Knows chat templates and tokenizers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import has_lone_surrogate
from .tokens import tokenize

PROBE, PARTS = '"ppow"', '[{"type": "text", "text": "ppow"}]'  # contents that a template is tried with


@dataclass
class Chat:
    """A row's chat as its template takes it.

    Args:
        messages (`list[dict]`): its messages.
        inputs (`dict`): what else the row gives the template: `tools`, `documents` and `chat_template_kwargs`.
        number (`int`): the row's place in the data, for errors.
    """

    messages: list[dict]
    inputs: dict[str, Any]
    number: int


def chats_of(rows: list[dict], argument: str) -> list[Chat]:
    """The chat of each row, by [`chat_of`]."""
    return [chat_of(row, number, argument) for number, row in enumerate(rows)]


def chat_of(row: Mapping, number: int, argument: str) -> Chat:
    """The chat of row `number`; raises `ValueError`, naming `argument` and the row, for what no template can write."""
    place = f"{argument}: `messages` of row {number}"
    messages = [] if row["messages"] is None else row["messages"]
    is_list = isinstance(messages, list | tuple)
    if not is_list or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ValueError(f"{place} is not a list of messages. Every message is a dict with `role` and `content`.")
    for turn, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else [] if content is None else [content]
        kinds = {"text" if isinstance(part, str) else _kind_of_part(part) for part in parts}
        if kinds - {"text"}:
            raise ValueError(
                f"{place} has, in message {turn}, a content of the kind {sorted(kinds - {'text'})[0]!r}. A drafter "
                "reads text: give a string, or a list of parts such as {'type': 'text', 'text': '...'}."
            )
    inputs = dict(_parsed(row.get("chat_template_kwargs"), dict, "chat_template_kwargs", number, argument) or {})
    for name in ("tools", "documents"):
        given = _parsed(row.get(name), list, name, number, argument)
        if given:
            inputs[name] = [
                _parsed(one, dict, name, number, argument) if isinstance(one, str) else one for one in given
            ]
    half = next((text for text in _texts_in([messages, inputs]) if has_lone_surrogate(text)), None)
    if half is not None:
        raise ValueError(
            f"{place} or what stands beside it holds half a character (a lone surrogate), which is no text. Remove "
            "it, or write the text again as UTF-8."
        )
    return Chat([dict(message) for message in messages], inputs, number)


def _kind_of_part(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part.get("type", "text"))
    return str(part.get("type", "dict")) if isinstance(part, Mapping) else type(part).__name__


def _parsed(value: Any, kind: type, name: str, number: int, argument: str) -> Any:
    """What a template is given as a list or dict, which some datasets hold as JSON; `None` where there is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"{argument}: `{name}` of row {number} is not JSON ({error}). Fix the row.") from error
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{argument}: `{name}` of row {number} is a {type(value).__name__}. Give a {kind.__name__}, also as JSON."
        )
    return value


def _texts_in(value: Any) -> Iterator[str]:
    """All strings in lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts_in(key)
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _apply_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str, **options: Any) -> Any:
    messages = chat.messages
    has_parts = any(isinstance(message.get("content"), list | tuple) for message in messages)
    template = tokenizer.get_chat_template()
    if has_parts and not _writes(tokenizer, template, PARTS):
        messages = [_with_joined_parts(message) for message in messages]
    elif not _writes(tokenizer, template, PROBE) and _writes(tokenizer, template, PARTS):
        messages = [_with_parts(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, **chat.inputs, **options)
    except Exception as error:  # whatever a template's own code raises for the values of a row
        raise ValueError(
            f"{argument}: the tokenizer's chat template refuses row {chat.number} ({error}). Its messages have the "
            f"roles {[message['role'] for message in messages]}; fix the row or pass another chat template."
        ) from error


def _with_joined_parts(message: dict) -> dict:
    """The message with a content of text parts as one string, for templates that add strings."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": "".join(part if isinstance(part, str) else part["text"] for part in content)}


def _with_parts(message: dict) -> dict:
    """The message with a content that is a string as a text part, for templates that write parts alone."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


@lru_cache(maxsize=32)
def _writes(tokenizer: PreTrainedTokenizerBase, template: str, content: str) -> bool:
    """Whether a chat template writes the text of a `content` given as JSON, rather than leave it out, fail or print
    the list."""
    probe = [{"role": "user", "content": json.loads(content)}]
    try:
        written = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
    except Exception:  # as above
        return False
    return "ppow" in written and "'text'" not in written and '"text"' not in written


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str, add_generation_prompt: bool = False) -> str:
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    return _apply_template(chat, tokenizer, argument, **options)


def chat_template_of(tokenizer: PreTrainedTokenizerBase, argument: str) -> str:
    """Raises `ValueError`, naming `argument`, where there is none."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{argument}: the rows have `messages`, but the tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, or give `text` or `prompt` + `completion` columns."
        )
    return tokenizer.get_chat_template()


def chat_sequences(rows: list[dict], tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[list, list]:
    """Token ids of each chat that has messages, and a mask of the assistant's tokens.

    Raises `ValueError`, naming `argument`, where the template or the tokenizer does not tell which tokens those are.
    """
    marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", chat_template_of(tokenizer, argument)) is not None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{argument}: the rows have `messages`, and finding the assistant's tokens takes a fast tokenizer; "
            f"{type(tokenizer).__name__} is a slow one. Pass a fast one, or `input_ids` with a `loss_mask`."
        )
    token_ids, loss_masks = [], []
    for chat in chats_of(rows, argument):
        if not chat.messages:
            continue
        if marks_generation:
            encoded = _apply_template(
                chat,
                tokenizer,
                argument,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            ids, mask = encoded["input_ids"], [value != 0 for value in encoded["assistant_masks"]]
        else:
            ids, mask = _mask_by_prefixes(chat, tokenizer, argument)
        token_ids.append(ids)
        loss_masks.append(mask)
    return token_ids, loss_masks


def _mask_by_prefixes(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which belong to the assistant: those between the generation prompt and the turn's end.

    The prefixes are compared as text and found among the tokens by their offsets, since a token may straddle the end
    of a prefix, and some tokenizers put a space before a text that they are given on its own.
    """
    messages, number = chat.messages, chat.number
    whole = _render(chat, tokenizer, argument)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise ValueError(
                f"{argument}: row {number} begins with an assistant's message, so that its chat template does not "
                "tell where it starts. Put a user's message before it, or use a template with {% generation %}."
            )
        asked, answered = (replace(chat, messages=messages[:count]) for count in (turn, turn + 1))
        before = _render(asked, tokenizer, argument, add_generation_prompt=True)
        through = whole if turn == len(messages) - 1 else _render(answered, tokenizer, argument)
        if not (whole.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"{argument}: the tokenizer's chat template writes message {turn} of row {number} differently when it "
                "is the last one than when others follow, or than its generation prompt begins it, so that the "
                "assistant's tokens cannot be told. Use a template with {% generation %}, keep one assistant message "
                "per row (the last), or pass `input_ids` with a `loss_mask`."
            )
        inside = [i for i, (start, _) in enumerate(encoded["offset_mapping"]) if len(before) <= start < len(through)]
        # What the template puts after the end token (a line feed, mostly) is not the assistant's: it has stopped.
        for i in inside[: _end_of_turn(inside, encoded["offset_mapping"], ids, through, tokenizer)]:
            mask[i] = True
    return ids, mask


def _end_of_turn(
    inside: list[int], offsets: list, ids: list[int], through: str, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """How many of a turn's tokens `inside` a chat there are through the one that ends it; `None`: all.

    The end is the last end-of-sequence token, or (Gemma) a special token that nothing but white space follows.
    """
    for count in range(len(inside), 0, -1):
        if ids[inside[count - 1]] == tokenizer.eos_token_id:
            return count
    for count in range(len(inside), 0, -1):
        if through[offsets[inside[count - 1]][1] :].strip():
            return None
        if ids[inside[count - 1]] in tokenizer.all_special_ids:
            return count
    return None


def chat_prompts(rows: list[dict], tokenizer: PreTrainedTokenizerBase, argument: str) -> list[list[int]]:
    """Token ids of each chat up to its last user turn, with the opening of the assistant's."""
    chat_template_of(tokenizer, argument)
    texts = []
    for chat in chats_of(rows, argument):
        user_turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == "user"]
        if user_turns:
            asked = replace(chat, messages=chat.messages[: user_turns[-1] + 1])
            texts.append(_render(asked, tokenizer, argument, add_generation_prompt=True))
    return list(tokenize(texts, tokenizer))


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, argument: str) -> list[int]:
    """Token ids of a chat through its template, with the opening of the assistant's turn.

    Raises `ValueError`, naming `argument` and the row, where the template refuses the messages.
    """
    text = _render(chat, tokenizer, argument, add_generation_prompt=True)
    return next(tokenize([text], tokenizer))
