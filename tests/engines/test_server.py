"""An exported drafter behind vLLM's OpenAI server, started by the command of the export's README."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from ppow_hf import tiny
from ppow_hf.data.models import load_tokenizer
from ppow_hf.serving.vllm_runner import CPU_ENVIRONMENT

pytestmark = pytest.mark.engines

START_SECONDS = 300


@contextlib.contextmanager
def server(command, folder):
    """The server's address while it runs; its log is shown if it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **CPU_ENVIRONMENT},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_server_answers_with_the_targets_text(engine_python, exported, ours, plain, prompts):
    folder = exported("eagle", ours.drafters["eagle"])
    readme = (folder / "README.md").read_text()
    words = shlex.split(next(line for line in readme.splitlines() if line.startswith("vllm serve")))
    assert words[:2] == ["vllm", "serve"] and words[3] == "--speculative-config"
    # PyPI's CPU build lacks the metadata that the vllm command reads; its module is the same program. The README
    # finds the embedded target's folder with a command that the shell runs.
    command = [engine_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.target_path())]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--served-model-name", "tiny"]
    tokenizer = load_tokenizer("tiny")
    with server([*command, *words[3:], *options], folder.parent) as address:
        body = {"model": "tiny", "prompt": prompts[:8], "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            choices = json.load(response)["choices"]
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
            metrics = response.read().decode()
    texts = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    assert texts == [tokenizer.decode(output, skip_special_tokens=True) for output in plain.outputs[:8]]
    accepted = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert len(accepted) == 1 and float(accepted[0].split()[-1]) >= 8
