"""One run of prompts through vLLM, described by a file and answered by a file.

Executed by its path with the interpreter of the environment that vLLM is in (`python vllm_job.py JOB RESULT`), so it
imports vLLM and the standard library only, never the package it lies in.

A job: `engine` (arguments of `vllm.LLM`), `prompts` (lists of token ids), `max_tokens`, `one_by_one` (each prompt
alone, or all together as the engine batches them), `ignore_eos`, `warm_up` (run the first prompt before the clock
starts). A result: `outputs`, `seconds`, `cpu_seconds`, `tokens`, `drafts` (windows verified), `drafted`,
`accepted`, `accepted_per_position`, `version`.
"""

import json
import sys
import time
from pathlib import Path

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_per_position",
}


def main(job_path, result_path):
    import vllm

    job = json.loads(Path(job_path).read_text())
    llm = vllm.LLM(**job["engine"])
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=job["ignore_eos"], detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    if job["warm_up"]:
        llm.generate(prompts[:1], params, use_tqdm=False)
    before = read_counters(llm)
    started, cpu_started = time.perf_counter(), time.process_time()
    if job["one_by_one"]:
        answers = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    else:
        answers = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    outputs = [list(answer.outputs[0].token_ids) for answer in answers]
    result = {
        "outputs": outputs,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": sum(map(len, outputs)),
        "version": vllm.__version__,
        **difference(read_counters(llm), before),
    }
    Path(result_path).write_text(json.dumps(result))


def read_counters(llm):
    found = {"drafts": 0, "drafted": 0, "accepted": 0, "accepted_per_position": []}
    for metric in llm.get_metrics():
        name = COUNTERS.get(metric.name)
        if name == "accepted_per_position":
            found[name] = list(metric.values)
        elif name is not None:
            found[name] = metric.value
    return found


def difference(after, before):
    earlier = before["accepted_per_position"] or [0] * len(after["accepted_per_position"])
    positions = [new - old for new, old in zip(after["accepted_per_position"], earlier, strict=True)]
    counts = {name: after[name] - before[name] for name in ("drafts", "drafted", "accepted")}
    return {**counts, "accepted_per_position": positions}


if __name__ == "__main__":
    main(*sys.argv[1:3])
