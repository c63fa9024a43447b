"""Runs prompts through a vLLM that lives in an environment of its own, and brings back what it generated and counted.

Knows processes and files; vLLM itself is only met in [`vllm_job`], which the other environment's interpreter executes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engine_process import EngineRun, engine_python, run_job

PYTHON_VARIABLE = "PPOW_VLLM_PYTHON"
# In the process that asks, one engine after the other: starts in seconds instead of tens of them.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def vllm_python(python: str | None = None) -> str:
    """The interpreter of vLLM's environment: `python`, or what `PPOW_VLLM_PYTHON` names.

    Raises `FileNotFoundError`, saying how to make one, if there is none.
    """
    how = "make one for a CPU with tests/engines/make_environment.sh FOLDER, or install vllm in a new one"
    return engine_python("vLLM", PYTHON_VARIABLE, how, python)


def run_vllm(
    model: str | Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 64,
    speculative: dict[str, Any] | None = None,
    *,
    python: str | None = None,
    one_by_one: bool = False,
    ignore_eos: bool = True,
    warm_up: bool = False,
    environment: dict[str, str] | None = None,
    timeout_seconds: float = 900,
    **engine: Any,
) -> EngineRun:
    """Generate greedily from token ids with vLLM, in float32 and without compilation unless `engine` says otherwise.

    Args:
        model (`str` or `Path`): the target's folder or name, or a directory in speculators' format.
        prompts (`Sequence[Sequence[int]]`): token ids of each prompt.
        max_tokens (`int`, *optional*, defaults to `64`): new tokens of each.
        speculative (`dict`, *optional*): vLLM's `speculative_config`.
        python (`str`, *optional*): interpreter of vLLM's environment, see [`vllm_python`].
        one_by_one (`bool`, *optional*, defaults to `False`): whether each prompt runs alone.
        ignore_eos (`bool`, *optional*, defaults to `True`): whether to go on after an end-of-sequence token.
        warm_up (`bool`, *optional*, defaults to `False`): whether to run a prompt before the clock starts.
        environment (`dict`, *optional*): further environment variables.
        engine: further arguments of `vllm.LLM`.

    Raises:
        `RuntimeError`: with the last lines that vLLM printed, if it fails.
    """
    interpreter = vllm_python(python)
    longest = max(map(len, prompts)) + max_tokens
    options: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": max(256, longest + 32),
        "max_num_seqs": 8,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        **({"speculative_config": speculative} if speculative else {}),
        **engine,
    }
    job = {
        "engine": options,
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "one_by_one": one_by_one,
        "ignore_eos": ignore_eos,
        "warm_up": warm_up,
    }
    script = Path(__file__).with_name("vllm_job.py")
    return run_job("vLLM", interpreter, script, job, {**CPU_ENVIRONMENT, **(environment or {})}, timeout_seconds)
