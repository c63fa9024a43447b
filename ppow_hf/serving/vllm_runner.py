"""Runs prompts through a vLLM that lives in an environment of its own, and brings back what it generated and counted.

Knows processes and files; vLLM itself is only met in [`vllm_job`], which the other environment's interpreter executes.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON_VARIABLE = "PPOW_VLLM_PYTHON"
ERROR_LINES = 15
# In the process that asks, one engine after the other: starts in seconds instead of tens of them.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass
class EngineRun:
    """What vLLM did with the prompts.

    Args:
        outputs (`list[list[int]]`): new token ids of each prompt.
        seconds (`float`): time of all of them, starting the engine not counted.
        cpu_seconds (`float`): time that its process computed; on a CPU that others use too, what compares runs.
        tokens (`int`): new tokens in all.
        drafts, drafted, accepted (`int`): verified windows, draft tokens in them, and those kept.
        accepted_per_position (`list[int]`): windows whose draft tokens up to each position were kept.
        version (`str`): vLLM's.
    """

    outputs: list[list[int]]
    seconds: float
    cpu_seconds: float
    tokens: int
    drafts: int
    drafted: int
    accepted: int
    accepted_per_position: list[int]
    version: str

    @property
    def acceptance_length(self) -> float:
        """Mean of accepted + 1 over verified windows (the target's own token counted); 1 without any."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def vllm_python(python: str | None = None) -> str:
    """The interpreter of vLLM's environment: `python`, or what `PPOW_VLLM_PYTHON` names.

    Raises `FileNotFoundError`, saying how to make one, if there is none.
    """
    path = python or os.environ.get(PYTHON_VARIABLE)
    if not path or not Path(path).is_file():
        raise FileNotFoundError(
            f"{PYTHON_VARIABLE}: {path!r} is no interpreter. vLLM needs an environment of its own; make one for a CPU "
            "with tests/engines/make_environment.sh FOLDER, or install vllm in a new virtual environment, and name "
            "its bin/python."
        )
    return str(path)


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
        ignore_eos (`bool`, *optional*, defaults to `True`): whether to go on behind an end-of-sequence token.
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
    with tempfile.TemporaryDirectory(prefix="ppow-vllm-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        job_path.write_text(json.dumps(job), encoding="utf-8")
        finished = subprocess.run(
            [interpreter, str(Path(__file__).with_name("vllm_job.py")), str(job_path), str(result_path)],
            env={**os.environ, **CPU_ENVIRONMENT, **(environment or {})},
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
        )
        if finished.returncode != 0 or not result_path.is_file():
            last = "\n".join(finished.stdout.strip().splitlines()[-ERROR_LINES:])
            raise RuntimeError(f"vLLM ended with exit code {finished.returncode}:\n{last}")
        return EngineRun(**json.loads(result_path.read_text(encoding="utf-8")))
