"""Texts that a target writes for training: what is asked, turn by turn, what is kept of the answers, and where.

Knows no model and no engine: a [`Writer`] answers the requests.
"""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from .chats import chat_of, encode_chat
from .files import write_whole
from .rows import TEMPLATE_COLUMNS, read_rows
from .sources import parse_source
from .tokens import open_prompts

SELF_PROMPT_TEMPERATURE = 1.0  # Magpie's, 2406.08464
LOOP_COPIES = 3
LOOP_TOKENS = 24  # that the copies of a loop have together, at least: a row of dots is none
PLACEHOLDER = "\ue000"  # private use: no chat template has it


class Opening(NamedTuple):
    """How a chat template opens and ends a user's turn.

    Args:
        text (`str`): all that stands before the user's words.
        token_ids (`list[int]`): its tokens.
        end_ids (`list[int]`): the token that ends the turn, if it is a special one.
        end_text (`str`, *optional*): that token's text, or what follows the user's words where it is none.
    """

    text: str
    token_ids: list[int]
    end_ids: list[int]
    end_text: str | None


class Request(NamedTuple):
    """What a writer continues.

    Args:
        text (`str`): the prompt, where it is a text, and `messages` is `None`.
        messages (`list[dict]`, *optional*): the chat to answer.
        prompt_ids (`list[int]`): the same in tokens.
        temperature (`float`): 0 takes the most likely token.
        seed (`int`): of the samples, where the writer takes one.
        stop_ids (`list[int]`): tokens that end the answer, beside the target's own ends of sequence.
        stop_text (`str`, *optional*): text that does, for a writer that knows no tokens.
        template_inputs (`dict`, *optional*): the chat's `tools`, `documents` and `chat_template_kwargs`.
    """

    text: str
    messages: list[dict] | None
    prompt_ids: list[int]
    temperature: float
    seed: int
    stop_ids: Sequence[int] = ()
    stop_text: str | None = None
    template_inputs: dict[str, Any] = {}


class Answer(NamedTuple):
    """What a writer wrote.

    Args:
        text (`str`): without the end of sequence.
        token_ids (`list[int]`): with it; where the writer knows no tokens, those of the text.
        finished (`bool`): whether the target ended it, and not the limit.
        exact (`bool`): whether `token_ids` are the target's own.
    """

    text: str
    token_ids: list[int]
    finished: bool
    exact: bool = True


class Writer(Protocol):
    """What answers requests, `chunk_size` of them at once; `None` where it refuses one."""

    chunk_size: int
    context_length: int | None

    def __call__(self, requests: list[Request]) -> list[Answer | None]: ...


@dataclass
class Conversation:
    """A prompt to complete, or a chat to answer turn by turn, and the rows that it has given.

    Args:
        key (`str`): its name in the file.
        temperature (`float`): of the answers.
        number (`int`): of the row that it comes from, for errors.
        text (`str`, *optional*): the prompt of a text.
        pending (`list[list[dict]]`): of a chat, the messages before each answer still to come.
        columns (`dict`): of a chat, the row's other columns that its template is given (`tools` and the like).
        opening ([`Opening`], *optional*): of a chat whose user's turn the target writes, until it has.
    """

    key: str
    temperature: float
    number: int
    text: str | None = None
    pending: list[list[dict]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    opening: Opening | None = None
    messages: list[dict] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    dropped: str | None = None

    @property
    def is_open(self) -> bool:
        left = self.opening is not None or bool(self.pending) or (self.text is not None and not self.rows)
        return left and self.dropped is None

    def as_asked(self) -> dict[str, Any]:
        """The prompt, or the messages so far and all those still to come."""
        if self.text is not None:
            return {"prompt": self.text}
        return {"messages": self.messages + [message for turn in self.pending for message in turn], **self.columns}

    def request(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Request:
        """What the target is to continue next."""
        seed = _number_of(seed, self.key, len(self.messages))
        if self.opening is not None:
            text, ids, end_ids, end_text = self.opening
            return Request(text, None, ids, SELF_PROMPT_TEMPERATURE, seed, end_ids, end_text)
        if self.text is not None:
            self.prompt_ids = open_prompts([self.text], tokenizer)[0]
            return Request(self.text, None, self.prompt_ids, self.temperature, seed)
        asked = [*self.messages, *self.pending[0]]
        chat = chat_of({"messages": asked, **self.columns}, self.number, "--prompts")
        self.prompt_ids = encode_chat(chat, tokenizer, "--prompts")
        settings = dict(chat.inputs)
        inputs: dict[str, Any] = {name: settings.pop(name) for name in ("tools", "documents") if name in settings}
        if settings:
            inputs["chat_template_kwargs"] = settings
        return Request("", asked, self.prompt_ids, self.temperature, seed, template_inputs=inputs)

    def take(self, answer: Answer | None, seen: set[str]) -> None:
        """Go on with an answer: a row more, or the reason why the conversation ends here."""
        if self.opening is not None:
            self._take_question(answer, seen)
            return
        self.dropped = reason_to_drop(answer, seen)
        if answer is None or self.dropped is not None:
            return
        row: dict[str, Any] = {"id": self.key}
        if self.text is not None:
            row |= {"prompt": self.text, "completion": answer.text}
        else:
            self.messages += [*self.pending.pop(0), {"role": "assistant", "content": answer.text}]
            row |= {"messages": list(self.messages), **self.columns}
            if not answer.finished:  # nobody asks on after half an answer
                self.pending = []
        row |= {"prompt_ids": self.prompt_ids, "completion_ids": answer.token_ids, "temperature": self.temperature}
        self.rows.append(row if answer.exact else row | {"retokenized": True})

    def _take_question(self, answer: Answer | None, seen: set[str]) -> None:
        self.opening = None
        self.dropped = reason_to_drop(answer, seen)
        if answer is None or self.dropped is not None:
            return
        if not answer.finished:
            self.dropped = "unfinished question"
            return
        self.pending = [[{"role": "user", "content": answer.text.strip()}]]


# What is asked


def read_conversations(
    source: str, temperatures: Sequence[float], *, chat: bool = False, count: int | None = None
) -> tuple[list[Conversation], int]:
    """The prompts of a file or dataset, each once, and how many were left out as repeated or empty.

    Rows have `messages`, whose user turns are asked one after the other (assistant's messages are left out: the target
    writes its own), or `prompt`; of a `.txt` file each line is a prompt. Prompts take the temperatures in turn.

    Args:
        source (`str`): what [`read_prompt_rows`] reads.
        temperatures (`Sequence[float]`): of the answers.
        chat (`bool`, *optional*, defaults to `False`): whether each `prompt` is asked as a user's turn of a chat.
        count (`int`, *optional*): rows taken, from the first on.

    Raises `ValueError` for rows without a prompt.
    """
    rows = read_prompt_rows(source)[:count]
    conversations: dict[str, Conversation] = {}
    for number, row in enumerate(rows):
        text, pending = _prompt_of(row, number, chat)
        if not pending and not (text or "").strip():
            continue
        columns = {name: row[name] for name in TEMPLATE_COLUMNS[1:] if row.get(name)} if pending else {}
        asked = [text, pending, columns] if columns else [text, pending]
        key = _text_hash(json.dumps(asked, sort_keys=True).replace("\\n", " "))
        if key not in conversations:
            temperature = temperatures[len(conversations) % len(temperatures)]
            conversations[key] = Conversation(key, temperature, number, text, pending, columns)
    if not conversations:
        raise ValueError(f"--prompts: none of the {len(rows)} rows of {source!r} has a prompt. Give at least one.")
    return list(conversations.values()), len(rows) - len(conversations)


def read_prompt_rows(source: str) -> list[dict]:
    """The rows that [`read_rows`] reads, but of a `.txt` file a prompt for each line that is not blank."""
    place = parse_source(source)
    if place.is_dataset or not place.path.endswith(".txt"):
        return read_rows(source, "--prompts")
    if place.column is not None:
        raise ValueError(
            f"--prompts: {source!r} given, and each line of a .txt file is a prompt: it has no columns. Leave "
            f"{':' + place.column!r} out."
        )
    (whole,) = read_rows(source, "--prompts")
    rows = [{"prompt": line} for line in whole["text"].splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"--prompts: {source!r} has no prompt: every line is blank. Give at least one.")
    return rows


def self_prompted(
    count: int, temperatures: Sequence[float], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Conversation]:
    """`count` chats whose user's turn the target writes too, at T = 1, from its chat template's opening of one.

    [Magpie, 2406.08464]. Raises `ValueError` for a tokenizer without a chat template.
    """
    opening = opening_of_user_turn(tokenizer)
    return [
        Conversation(f"self-{seed}-{number}", temperatures[number % len(temperatures)], number, opening=opening)
        for number in range(count)
    ]


def opening_of_user_turn(tokenizer: PreTrainedTokenizerBase) -> Opening:
    """See [`Opening`]; raises `ValueError` where the tokenizer's chat template gives none."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "--self-prompted: the target's tokenizer has no chat template, from which it would write a user's turn. "
            "Name an instruct target, or give --prompts."
        )
    turn = [{"role": "user", "content": PLACEHOLDER}]
    before, found, behind = tokenizer.apply_chat_template(turn, tokenize=False).partition(PLACEHOLDER)
    if not found or not before:
        raise ValueError("--self-prompted: the chat template writes nothing before a user's words. Give --prompts.")
    end_ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][:1]
    if end_ids and tokenizer.decode(end_ids) in tokenizer.get_added_vocab():
        end_text = tokenizer.decode(end_ids)
    else:
        end_ids, end_text = [], behind or None
    return Opening(before, tokenizer(before, add_special_tokens=False)["input_ids"], end_ids, end_text)


def _prompt_of(row: dict, number: int, chat: bool) -> tuple[str | None, list[list[dict]]]:
    """The text of a prompt, or the messages before each answer of a chat."""
    if "messages" in row:
        pending: list[list[dict]] = [[]]
        messages = row["messages"] or []
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise ValueError(
                f"--prompts: `messages` of row {number} is not a list of messages. Every message is a dict with "
                "`role` and `content`."
            )
        for message in messages:
            if message["role"] == "assistant":
                continue
            pending[-1].append(message)
            if message["role"] == "user":
                pending.append([])
        return None, pending[:-1]
    if not isinstance(row.get("prompt"), str):
        raise ValueError(
            f"--prompts: row {number} has the columns {sorted(row)}; `messages` or a `prompt` that is a string is "
            "needed. With :COLUMN after the name, prompts are taken from another column."
        )
    if chat:
        return None, [[{"role": "user", "content": row["prompt"]}]] if row["prompt"].strip() else []
    return row["prompt"], []


# What is kept


def reason_to_drop(answer: Answer | None, seen: set[str]) -> str | None:
    """Why an answer is not kept, or `None`; a kept one is added to `seen`, as a hash of its text."""
    if answer is None:
        return "refused"
    if not answer.text.strip():
        return "empty"
    if is_looping(answer.token_ids[:-1] if answer.finished else answer.token_ids):
        return "looping"
    digest = _text_hash(answer.text)
    if digest in seen:
        return "repeated"
    seen.add(digest)
    return None


def is_looping(tokens: Sequence) -> bool:
    """Whether the end is one passage three times over, of 24 tokens or more together. [ours]"""
    tokens = list(tokens)
    longest = len(tokens) // LOOP_COPIES
    shortest = -(-LOOP_TOKENS // LOOP_COPIES)
    # A shorter period's loop is one of its multiples too.
    return any(tokens[-LOOP_COPIES * n : -n] == tokens[-(LOOP_COPIES - 1) * n :] for n in range(shortest, longest + 1))


# The file


class TextFile:
    """Rows on disk that a later call goes on from: `FILE.jsonl`, `FILE.json` (how they were written) and
    `FILE.dropped.jsonl` (what was left out, and why).

    Args:
        path (`Path`): the file of rows.
        settings (`dict`): must be those of an earlier call; raises `ValueError` naming the first that is not.
        facts (`dict`, *optional*): kept beside the settings, and free to change.
    """

    def __init__(self, path: Path, settings: dict[str, Any], facts: dict[str, Any] | None = None):
        self.path, self.dropped_path = path, path.with_suffix(".dropped.jsonl")
        record = path.with_suffix(".json")
        settings = json.loads(json.dumps(settings))
        if record.is_file():
            earlier = _settings_in(record)
            for name, value in settings.items():
                if earlier.get(name) != value:
                    raise ValueError(
                        f"--output: {str(path)!r} was begun with {name} = {earlier.get(name)!r}, and now it is "
                        f"{value!r}. Pass the same settings to go on with it, or another file."
                    )
        elif path.is_file() and path.stat().st_size:
            raise ValueError(
                f"--output: {str(path)!r} is there already, without {record.name}, so that it is not one of this "
                "command. Pass another file."
            )
        write_whole(record, json.dumps({"settings": settings, **(facts or {})}, indent=1) + "\n")
        self.rows, self.seen, self.done = 0, set[str](), set[str]()
        for row in _whole_lines(path):
            self.rows += 1
            self.done.add(row["id"])
            self.seen.update(map(_text_hash, _written_in(row)))
        self.done.update(row["id"] for row in _whole_lines(self.dropped_path))

    def add(self, conversations: Iterable[Conversation]) -> None:
        kept, dropped = [], []
        for one in conversations:
            self.done.add(one.key)
            kept += one.rows
            if one.dropped is not None:
                dropped.append({"id": one.key, "reason": one.dropped, **one.as_asked()})
        self.rows += len(kept)
        for path, rows in ((self.path, kept), (self.dropped_path, dropped)):
            if rows:
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _written_in(row: dict) -> list[str]:
    """What the target wrote of a row: its answers, and its own questions."""
    if "messages" not in row:
        return [row["completion"]]
    roles = {"user", "assistant"} if row["id"].startswith("self-") else {"assistant"}
    return [str(message.get("content")) for message in row["messages"] if message.get("role") in roles]


def _settings_in(record: Path) -> dict[str, Any]:
    """The settings in `FILE.json`; raises `ValueError` where it is not one that a [`TextFile`] wrote."""
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (ValueError, LookupError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"--output: the settings would be in {str(record)!r}, which is there already and not one of this command. "
            "Pass another file."
        )
    return settings


def _whole_lines(path: Path) -> Iterator[dict]:
    """The rows of a file; what a write that was cut off left at its end is removed from it."""
    if not path.is_file():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "id" not in row:
            raise ValueError(f"--output: {str(path)!r}, line {number} is no row of this command. Pass another file.")
        yield row


# Writing


@dataclass
class WrittenTexts:
    """What a call wrote.

    Args:
        conversations, rows (`int`): how many of them.
        tokens (`int`): that the target wrote, those of dropped rows too.
        seconds (`float`): that it took.
        dropped (`Counter`): how many ended with an answer that is `"empty"`, `"repeated"`, `"looping"` or `"refused"`
            (by the chat template or the server), with a prompt `"too long"`, or an `"unfinished question"`.
    """

    conversations: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dropped: Counter = field(default_factory=Counter)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def chunks_of(conversations: list[Conversation], size: int, seed: int) -> list[list[Conversation]]:
    """Chunks of one temperature and about one length of the first prompt; the longest first, the others by lot.

    So a lack of memory shows at once, little is padded, and what is written so far is like the whole.
    """

    def length(one: Conversation) -> int:
        return len(one.text or "") + sum(len(str(message.get("content"))) for turn in one.pending for message in turn)

    ordered = sorted(conversations, key=lambda one: (one.temperature, -length(one)))
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    chunks.sort(key=lambda chunk: -length(chunk[0]))
    others = chunks[1:]
    random.Random(seed).shuffle(others)
    return chunks[:1] + others


def write_texts(
    conversations: list[Conversation],
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    file: TextFile,
    seed: int = 0,
    progress: Any = None,
) -> WrittenTexts:
    """Have `writer` answer what `file` does not hold yet, chunk by chunk, and keep what is worth it.

    Args:
        progress (*optional*): called with the number of conversations after each chunk.
    """
    written = WrittenTexts()
    started = time.perf_counter()
    for chunk in chunks_of(conversations, writer.chunk_size, seed):
        left = [one for one in chunk if one.key not in file.done]
        while waiting := [one for one in left if one.is_open]:
            written.tokens += _answer(waiting, writer, tokenizer, file.seen, seed)
        file.add(left)
        written.conversations += len(left)
        written.rows += sum(len(one.rows) for one in left)
        written.dropped.update(one.dropped for one in left if one.dropped is not None)
        written.seconds = time.perf_counter() - started
        if progress is not None:
            progress(len(chunk))
    return written


def _answer(
    waiting: list[Conversation], writer: Writer, tokenizer: PreTrainedTokenizerBase, seen: set[str], seed: int
) -> int:
    """One turn of each conversation; returns how many tokens were written."""
    requests = []
    for one in waiting:
        try:
            request = one.request(tokenizer, seed)
        except ValueError:  # the chat template takes no such messages
            one.dropped = "refused"
            continue
        if writer.context_length is not None and len(request.prompt_ids) >= writer.context_length:
            one.dropped = "too long"
        else:
            requests.append((one, request))
    answers = writer([request for _, request in requests]) if requests else []
    for (one, _), answer in zip(requests, answers, strict=True):
        one.take(answer, seen)
    return sum(len(answer.token_ids) for answer in answers if answer is not None)


def _text_hash(text: str) -> str:
    """Of texts that differ in white space alone the same."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _number_of(*parts: Any) -> int:
    """A seed; those of different conversations and turns never meet."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
