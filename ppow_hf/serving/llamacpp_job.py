"""One run of prompts through llama.cpp's server, described by a file and answered by a file.

Executed by its path with the interpreter of the environment that `xllamacpp` is in (`python llamacpp_job.py JOB
RESULT`), so it imports xllamacpp and the standard library only, never the package it lies in.

A job: `model` (GGUF file), `draft` (GGUF file or null), `kind` (llama.cpp's kind of speculation or null), `window`,
`prompts` (lists of token ids), `max_tokens`, `ignore_eos`, `warm_up`, `context` (tokens of it), `threads`. Each prompt
runs alone. A result: as that of vllm_job.py, without what was accepted per position, which the server does not say.
"""

import importlib.metadata
import json
import sys
import time
import urllib.request
from pathlib import Path

KINDS = {
    "draft_model": "COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE",
    "eagle3": "COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3",
    "ngram": "COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE",
}
NGRAM = 3  # tokens that must have occurred before, as in engine_bench


def main(job_path, result_path):
    import xllamacpp

    job = json.loads(Path(job_path).read_text())
    server = xllamacpp.Server(parameters(xllamacpp, job))
    if job["warm_up"]:
        complete(server, job, job["prompts"][0])
    started, cpu_started = time.perf_counter(), time.process_time()
    answers = [complete(server, job, prompt) for prompt in job["prompts"]]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    outputs = [answer["tokens"] for answer in answers]
    accepted = sum(answer["timings"].get("draft_n_accepted", 0) for answer in answers)
    result = {
        "outputs": outputs,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": sum(map(len, outputs)),
        # Every target pass after the prompt's gives one token of its own; by n-gram some of them verify nothing.
        "drafts": sum(map(len, outputs)) - len(outputs) - accepted if job["kind"] else 0,
        "drafted": sum(answer["timings"].get("draft_n", 0) for answer in answers),
        "accepted": accepted,
        "version": importlib.metadata.version("xllamacpp"),
    }
    Path(result_path).write_text(json.dumps(result))


def parameters(xllamacpp, job):
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx, params.n_parallel = job["context"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup, params.cache_prompt, params.fit_params, params.verbosity = False, False, False, 0
    if job["kind"]:
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, KINDS[job["kind"]])]
    if job["kind"] == "ngram":
        params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m = NGRAM, job["window"]
    elif job["kind"]:
        draft = params.speculative.draft
        draft.mparams.path, draft.n_max = job["draft"], job["window"]
        draft.cache_type_k = draft.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = job["threads"]
    return params


def complete(server, job, prompt):
    request = {
        "prompt": prompt,
        "n_predict": job["max_tokens"],
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "return_tokens": True,
        "cache_prompt": False,
        "ignore_eos": job["ignore_eos"],
    }
    # Over its own HTTP server: the Python call answers in OpenAI's form, without token ids.
    address = f"{server.listening_address}/completion"
    body = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(body) as response:
        return json.load(response)


if __name__ == "__main__":
    main(*sys.argv[1:3])
