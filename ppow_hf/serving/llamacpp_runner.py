"""Runs prompts through a llama.cpp that lives in an environment of its own, and brings back what it generated.

Knows the job's fields; llama.cpp itself is only met in [`llamacpp_job`].
"""

from collections.abc import Sequence
from pathlib import Path

from .engine_process import EngineRun, engine_python, run_job

PYTHON_VARIABLE = "PPOW_LLAMACPP_PYTHON"


def llamacpp_python(python: str | None = None) -> str:
    """The interpreter that has xllamacpp: `python`, or what `PPOW_LLAMACPP_PYTHON` names."""
    how = "make one with tests/engines/make_llamacpp_environment.sh FOLDER, or install xllamacpp in a new one"
    return engine_python("llama.cpp", PYTHON_VARIABLE, how, python)


def run_llamacpp(
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 64,
    kind: str | None = None,
    draft: str | Path | None = None,
    window: int = 5,
    *,
    python: str | None = None,
    ignore_eos: bool = True,
    warm_up: bool = False,
    threads: int = 1,
    timeout_seconds: float = 900,
) -> EngineRun:
    """Generate greedily from token ids with llama.cpp's server, one prompt after the other; see [`run_vllm`].

    Args:
        model (`str` or `Path`): the target's GGUF file.
        kind (`str`, *optional*): `"draft_model"`, `"eagle3"` or `"ngram"`; by default no speculation.
        draft (`str` or `Path`, *optional*): the drafter's GGUF file.
        window (`int`, *optional*, defaults to `5`): most draft tokens a round.
        threads (`int`, *optional*, defaults to `1`): of the CPU.
    """
    job = {
        "model": str(model),
        "draft": None if draft is None else str(draft),
        "kind": kind,
        "window": window,
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "ignore_eos": ignore_eos,
        "warm_up": warm_up,
        "context": max(256, max(map(len, prompts)) + max_tokens + 32),
        "threads": threads,
    }
    script = Path(__file__).with_name("llamacpp_job.py")
    return run_job("llama.cpp", llamacpp_python(python), script, job, {}, timeout_seconds)
