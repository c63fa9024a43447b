"""Secrets out of what is published: commands, records and texts.

Knows how tokens, keys and passwords are written; knows no files.
"""

import re
import shlex
from typing import Any

REDACTED = "REDACTED"
NAME = re.compile(r"(?:^|[-_.])(token|key|apikey|secret|password|passwd|credentials?)(?:$|[-_.])", re.IGNORECASE)
ENDS = re.compile(
    r"(token|secret|password|passwd|credentials?|(?:^|[-_.]|api|access|private|token|secret)key)$", re.IGNORECASE
)
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?|true|false|none|null", re.IGNORECASE)
ABBREVIATED = re.compile(r"hub_t(o(k(e)?)?)?")  # argparse reads any prefix of an option that is no other's
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{10,}|sk-[A-Za-z0-9_-]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[a-z]-[A-Za-z0-9-]{10,}|A(?:K|S)IA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)"
)
USER_OF_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
QUERY = re.compile(r"(?<=[?&])([\w-]*(?:token|key|secret|password|signature)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether an option or a field of this name holds a secret: `--hub-token`, `api_key`, `WANDB_API_KEY`."""
    plain = name.lstrip("-").replace("-", "_").lower()
    return bool(NAME.search(plain) or ENDS.search(plain) or ABBREVIATED.fullmatch(plain))


def redact_text(text: str) -> str:
    """`text` without what looks like a token, and without the credentials of URLs."""
    return QUERY.sub(rf"\1{REDACTED}", USER_OF_URL.sub(REDACTED, TOKEN.sub(REDACTED, text)))


def redact_command(command: str) -> str:
    """`command` without the values of options that hold secrets, however they are spelt, and as [`redact_text`]."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    kept: list[str] = []
    option: str | None = None  # the secret option whose values come next
    for word in words:
        name, equals, value = word.partition("=")
        if equals and is_secret_name(name):
            kept.append(f"{name}={_redact_value(name, value)}")
            option = None
        elif word.startswith("-") and not NUMBER.fullmatch(word):
            option = word if is_secret_name(word) else None
            kept.append(redact_text(word))
        else:
            kept.append(redact_text(word) if option is None else _redact_value(option, word))
    return shlex.join(kept)


def redact_record(value: Any, name: str = "") -> Any:
    """A JSON value without the secrets of its fields, at any depth; `name` is the field that it stands in."""
    if isinstance(value, dict):
        return {redact_text(str(key)): redact_record(one, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redact_record(one, name) for one in value]
    if not isinstance(value, str):
        return value
    if name == "command":
        return redact_command(value)
    return _redact_value(name, value) if value and is_secret_name(name) else redact_text(value)


def _redact_value(name: str, value: str) -> str:
    """Numbers stay where the name only has such a word in it: `pad_token_id`, `num_key_value_heads`."""
    harmless = NUMBER.fullmatch(value) and not ENDS.search(name)
    return value if harmless else REDACTED
