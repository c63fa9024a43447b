"""What the runners of all engines share: a job in a file, run by the interpreter of the engine's own environment.

Knows processes and files; the engines themselves are only met in the job scripts that the other interpreter runs.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ERROR_LINES = 15


class Speculation:
    """What the counts of a run say.

    Args:
        tokens (`int`): new tokens in all.
        seconds (`float`): their time, starting the engine not counted.
        drafts, drafted, accepted (`int`): verified windows, draft tokens in them, and those kept.
        accepted_per_position (`list[int]`):
            Windows whose draft tokens up to each position were kept; empty where the engine does not say.
    """

    tokens: int
    seconds: float
    drafts: int
    accepted: int

    @property
    def acceptance_length(self) -> float:
        """Mean of accepted + 1 over verified windows (the target's own token counted); 1 without any."""
        return 1 + self.accepted / self.drafts if self.drafts else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class EngineRun(Speculation):
    """What an engine did with the prompts.

    Args:
        outputs (`list[list[int]]`): new token ids of each prompt.
        version (`str`): the engine's.
        cpu_seconds (`float`):
            Time that its process computed; on a CPU that others use too, what compares runs. 0 where the engine
            computes in processes of its own.
    """

    outputs: list[list[int]]
    seconds: float
    tokens: int
    drafts: int
    drafted: int
    accepted: int
    accepted_per_position: list[int] = field(default_factory=list)
    version: str = ""
    cpu_seconds: float = 0.0


def engine_python(engine: str, variable: str, how: str, python: str | None = None) -> str:
    """The interpreter of an engine's environment: `python`, or what the environment's `variable` names.

    Raises `FileNotFoundError`, saying `how` to make one, if there is none.
    """
    path = python or os.environ.get(variable)
    if not path or not Path(path).is_file():
        given = f"{'--engine-python' if python else variable}: {path!r} is no interpreter."
        raise FileNotFoundError(f"{given} {engine} needs an environment of its own; {how}, and name its bin/python.")
    return str(path)


def run_job(
    engine: str, interpreter: str, script: Path, job: dict[str, Any], environment: dict[str, str], timeout: float
) -> EngineRun:
    """Run `script JOB RESULT` with `interpreter` in a folder of its own, and read the result.

    Raises `RuntimeError`, with the last lines that `engine` printed, if it fails.
    """
    with tempfile.TemporaryDirectory(prefix="ppow-engine-") as scratch:
        job_path, result_path = Path(scratch, "job.json"), Path(scratch, "result.json")
        job_path.write_text(json.dumps(job), encoding="utf-8")
        finished = subprocess.run(
            [interpreter, str(script), str(job_path), str(result_path)],
            env={**os.environ, **environment},
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        if finished.returncode != 0 or not result_path.is_file():
            last = "\n".join(finished.stdout.strip().splitlines()[-ERROR_LINES:])
            raise RuntimeError(f"{engine} ended with exit code {finished.returncode}:\n{last}")
        return EngineRun(**json.loads(result_path.read_text(encoding="utf-8")))
