"""A vLLM in its own environment that answers lines of JSON until it is told to end.

Knows processes and pipes; what is asked and answered is between a subclass and its job script.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .engine_process import ERROR_LINES
from .vllm_runner import CPU_ENVIRONMENT, vllm_python


class VLLMProcess:
    """A job script run by the interpreter of vLLM's environment: `script ENGINE FD`, see vllm_write_job.py.

    Args:
        script (`str`): its file beside this one.
        engine (`dict`): arguments of `vllm.LLM`, and what else the script takes.
        python (`str`, *optional*): interpreter of vLLM's environment, see [`vllm_python`].

    Raises `RuntimeError`, with the last lines that vLLM printed, when it ends before it is told to.
    """

    def __init__(self, script: str, engine: dict[str, Any], python: str | None = None):
        self._interpreter = vllm_python(python)
        self._script, self._engine = Path(__file__).with_name(script), engine

    def _start(self) -> Any:
        """Start it; what it says once it is ready."""
        reading, writing = os.pipe()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [self._interpreter, str(self._script), json.dumps(self._engine), str(writing)],
            env={**CPU_ENVIRONMENT, **os.environ},
            pass_fds=(writing,),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading, encoding="utf-8")
        return self._receive()

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = "\n".join(self._log.read().strip().splitlines()[-ERROR_LINES:])
            self.__exit__()
            raise RuntimeError(f"vLLM ended with exit code {code}:\n{last}")
        return json.loads(line)
