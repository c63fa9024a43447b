"""What went wrong, as one sentence for the person who typed the command: the argument, what it was, and the fix.

Knows errors, files and words of a command line. A bug of ours has no sentence, so that its traceback is seen.
"""

import argparse
import errno
import gzip
import json
import math
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.models import resolve
from ..data.weights import brief, error_chain, file_damage, folder_damage
from .typed import Typed, named_words

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("No space left on device", "File too large", "Disk quota exceeded", "unexpected pos")
# Errors that speak of bytes and name no file: the file is looked for among the arguments.
OF_FILES = (json.JSONDecodeError, UnicodeError, RecursionError, pickle.UnpicklingError, zipfile.BadZipFile,
            gzip.BadGzipFile, EOFError)  # fmt: skip


def explain(error: BaseException, argv: Sequence[str], typed: Typed) -> str | None:
    """One sentence about an error of the files, the models, the device or the arguments; `None` for any other."""
    if _is_full(error) and "disk" not in str(error):
        return "the disk is full, or a quota is: free some space, or name a folder on another disk, and run it again."
    if _is_out_of_memory(error):
        return f"memory ran out: {brief(error)} Take smaller batches or shorter texts, or another --device."
    if _module(error) == "safetensors" or isinstance(error, OF_FILES):
        damage = next(damages(argv), None)
        if damage is not None:
            return damage
    if _module(error) in ("httpx", "httpx2", "httpcore"):
        return f"the Hub could not be reached: {brief(error)} Look at the connection, or name local folders."
    if isinstance(error, ImportError | RuntimeError) and _is_missing_library(error):
        return f"a library is missing: {brief(error)}"
    if _module(error) in ("safetensors", "huggingface_hub") or isinstance(error, ValueError | OSError):
        return typed.sentence(" ".join(str(error).split()) if _is_ours(error) else brief(error))
    return None


def check_words(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Raise `ValueError` for words that are no text, and for numbers that are not finite."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            readable = word.encode(errors="replace").decode()
            raise ValueError(f"{readable!r}: it is not valid UTF-8. Type it again, or give it in a file.") from None
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')}: {value} given; a finite number is needed.")


def damages(argv: Sequence[str]) -> Iterator[str]:
    """Each damaged file or folder among the words of a command, after the argument that named it."""
    for option, value in named_words(argv):
        if value.startswith(("{", "[")) and (problem := _json_problem(value)):
            yield f"{option or 'argument'}: {value!r} is no JSON ({problem}). Fix it, or leave it out."
        if not value:
            continue
        path = Path(resolve(value))
        try:
            found = folder_damage(path) if path.is_dir() else file_damage(path) if path.is_file() else None
        except OSError as error:
            found = f"{path.name} cannot be read ({error.strerror or error})"
        if found is not None:
            place = f"{option}: " if option else ""
            yield f"{place}{value!r}: {found}."


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it, whose messages end with the fix and are not cut."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("ppow_hf")


def _is_missing_library(error: BaseException) -> bool:
    return "pip install" in str(error) or (isinstance(error, ImportError) and "ppow_hf" not in str(error))


def _json_problem(text: str) -> str | None:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def _module(error: BaseException) -> str:
    kind = type(error)
    name = kind.__module__.partition(".")[0]
    return "safetensors" if kind.__name__ == "SafetensorError" else name.removeprefix("_")


def _is_full(error: BaseException) -> bool:
    return any(
        getattr(one, "errno", None) in FULL or any(text in str(one) for text in FULL_TEXTS)
        for one in error_chain(error)
    )


def _is_out_of_memory(error: BaseException) -> bool:
    is_kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_kind or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
