"""Runs prompts through an SGLang that lives in an environment of its own, and brings back what it generated.

Knows the job's fields; SGLang itself is only met in [`sglang_job`].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engine_process import EngineRun, engine_python, run_job

PYTHON_VARIABLE = "PPOW_SGLANG_PYTHON"
ALGORITHMS = {"eagle": "EAGLE3", "standalone": "STANDALONE"}


def sglang_python(python: str | None = None) -> str:
    """The interpreter of SGLang's environment: `python`, or what `PPOW_SGLANG_PYTHON` names.

    Raises `FileNotFoundError`, saying how to make one, if there is none.
    """
    return engine_python("SGLang", PYTHON_VARIABLE, "install sglang in a new one", python)


def chains(architecture: str, draft: str | Path, window: int) -> dict[str, Any]:
    """SGLang's arguments for windows of `window` tokens, each a chain.

    Raises `ValueError` for architectures that are not drafted with here.
    """
    if architecture not in ALGORITHMS:
        raise ValueError(
            f"--drafter: {architecture} drafter given; in sglang take an eagle or standalone one, or another --engine."
        )
    return {
        "speculative_algorithm": ALGORITHMS[architecture],
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": window,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": window + 1,
    }


def run_sglang(
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 64,
    speculative: dict[str, Any] | None = None,
    *,
    python: str | None = None,
    at_a_time: int = 1,
    ignore_eos: bool = True,
    warm_up: bool = False,
    environment: dict[str, str] | None = None,
    timeout_seconds: float = 1800,
    **engine: Any,
) -> EngineRun:
    """Generate greedily from token ids with SGLang; see [`run_vllm`].

    Args:
        speculative (`dict`, *optional*): arguments of `sglang.Engine` that speculate, as of [`chains`].
        at_a_time (`int`, *optional*, defaults to `1`): prompts that run together.
        engine: further arguments of `sglang.Engine`.
    """
    job = {
        "engine": {
            "model_path": str(model),
            "skip_tokenizer_init": True,
            "disable_radix_cache": True,  # a prompt that comes again is read again
            "max_running_requests": at_a_time,
            "log_level": "warning",
            **(speculative or {}),
            **engine,
        },
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "one_by_one": at_a_time == 1,
        "ignore_eos": ignore_eos,
        "warm_up": warm_up,
    }
    script = Path(__file__).with_name("sglang_job.py")
    return run_job("SGLang", sglang_python(python), script, job, environment or {}, timeout_seconds)
