"""Texts become tokens, opened as their tokenizer opens them. Knows tokenizers."""

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

TEXTS_PER_TOKENIZER_CALL = 1000


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for start in range(0, len(texts), TEXTS_PER_TOKENIZER_CALL):
        chunk = texts[start : start + TEXTS_PER_TOKENIZER_CALL]
        yield from tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]


def tokenize_pairs(
    prompts: list[str], texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of each prompt and of the text that goes on with it, as they are tokenized together.

    A text of its own would begin with a space in some tokenizers. A token that is of both is the text's. Of a slow
    tokenizer, which does not say where tokens end, each is tokenized alone.
    """
    if not getattr(tokenizer, "is_fast", False):
        yield from zip(tokenize(prompts, tokenizer), tokenize(texts, tokenizer), strict=True)
        return
    for prompt, text in zip(prompts, texts, strict=True):
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoded = tokenizer(prompt + text, **options)
        count = sum(end <= len(prompt) for _, end in encoded["offset_mapping"])
        yield encoded["input_ids"][:count], encoded["input_ids"][count:]


def open_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's tokens after the bos token, if there is one; nothing for an empty text."""
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for ids in tokenize(texts, tokenizer):
        yield ids if not ids or ids[: len(opening)] == opening else opening + ids


def open_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each prompt's tokens as `tokenizer(prompt)` opens them, but never opened twice and never closed."""
    return opened(tokenize(prompts, tokenizer), tokenizer)


def opened(prompts: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of prompts after those that the tokenizer puts before a text, where they are not there yet."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    opening = whole[: starts[0]] if starts else []
    return [ids if ids[: len(opening)] == opening else opening + ids for ids in prompts]
