"""A tokenizer as the fields of a GGUF file: byte-level BPE, the kind of Llama 3, Qwen, GPT-2 and SmolLM.

Knows tokenizers only. llama.cpp holds the rules that split a text before merging, each under a name; a file gives the
name. A tokenizer whose rules have no name here is refused, since llama.cpp would tokenize otherwise without a word.
"""

import json
from dataclasses import dataclass
from typing import Any

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a splitting rule, by the regular expression of tokenizer.json.
SPLIT_NAMES = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
NAMES = ("gpt-2", "smollm", *SPLIT_NAMES.values())


@dataclass
class GGUFVocabulary:
    """What a GGUF file says about its tokenizer.

    Args:
        pre_tokenizer (`str`): llama.cpp's name of the splitting rule.
        tokens (`list[str]`): of every row of the embeddings.
        types (`list[int]`): llama.cpp's kind of each token.
        merges (`list[str]`): `"left right"`, most important first.
        special_ids (`dict[str, int]`): `bos`, `eos` and `pad`, those that the tokenizer has.
        adds_bos (`bool`): whether a text starts with the BOS token.
        chat_template (`str`, *optional*): Jinja text.
    """

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int]
    adds_bos: bool
    chat_template: str | None


def pre_tokenizer_name(described: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json; `None` if it is none of `NAMES`."""
    steps = [described or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None
    if not before:
        return "gpt-2" if last.get("use_regex", True) else None
    if before[0]["type"] == "Digits":
        return "smollm" if before[0].get("individual_digits") and last.get("use_regex", True) else None
    if before[0]["type"] != "Split" or last.get("use_regex", True) or before[0].get("behavior") != "Isolated":
        return None
    return SPLIT_NAMES.get(before[0]["pattern"].get("Regex"))


def gguf_vocabulary(tokenizer: Any, vocab_size: int) -> GGUFVocabulary:
    """The fields of `tokenizer` for a model with `vocab_size` rows of embeddings.

    Raises `ValueError` if it is not a byte-level BPE tokenizer that llama.cpp knows, or larger than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    model = described.get("model", {})
    name = pre_tokenizer_name(described.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or name is None:
        raise ValueError(
            f"tokenizer: a {type(tokenizer).__name__} that splits texts by other rules than {', '.join(NAMES)}; only "
            "byte-level BPE tokenizers with these are written as GGUF. Convert this model with llama.cpp's own script."
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer: {len(tokenizer)} tokens for a model of {vocab_size}; pass the target's own.")
    tokens, types = [f"[PAD{token}]" for token in range(vocab_size)], [UNUSED] * vocab_size
    for text, token in model["vocab"].items():
        tokens[token], types[token] = text, NORMAL
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    start = tokenizer("a").input_ids
    return GGUFVocabulary(
        pre_tokenizer=name,
        tokens=tokens,
        types=types,
        merges=merges,
        special_ids={kind: token for kind, token in ids.items() if token is not None},
        adds_bos=len(start) > 0 and start[0] == tokenizer.bos_token_id,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )
