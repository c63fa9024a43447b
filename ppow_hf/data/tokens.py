"""Texts become tokens, opened as their tokenizer opens them. Knows tokenizers."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

TEXTS_PER_TOKENIZER_CALL = 1000


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for start in range(0, len(texts), TEXTS_PER_TOKENIZER_CALL):
        chunk = texts[start : start + TEXTS_PER_TOKENIZER_CALL]
        yield from tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]


def open_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's tokens after the bos token, if there is one; nothing for an empty text."""
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for ids in tokenize(texts, tokenizer):
        yield ids if not ids or ids[: len(opening)] == opening else opening + ids


def open_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each prompt's tokens as `tokenizer(prompt)` opens them, but never opened twice and never closed."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    opened = tokenizer("a")["input_ids"]
    starts = [start for start in range(len(opened)) if opened[start : start + len(plain)] == plain]
    opening = opened[: starts[0]] if starts else []
    return [ids if ids[: len(opening)] == opening else opening + ids for ids in tokenize(prompts, tokenizer)]
