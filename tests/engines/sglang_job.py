"""Generates greedily with SGLang on a CPU: `sglang_job.py JOB RESULT`, with the folder `sglang_on_a_cpu` on the path.

SGLang's own are the scheduler, the workers, the loader, the models and the drafting. Its compiled library is stood in
for. SGLang starts its scheduler as a new process, which runs the top of this file too.
"""

import json
import os
import sys
import time
from pathlib import Path

import sgl_kernel

ROUNDS_VARIABLE = "PPOW_SGLANG_ROUNDS"  # the file in which the scheduler's process writes rounds

verify_tree_greedy = sgl_kernel.verify_tree_greedy_cpu


def recording_verify(*arguments, **named):
    """The stand-in's verification, which writes down what a round drafted and kept. One prompt at a time."""
    verify_tree_greedy(*arguments, **named)
    (tokens,), (accepted,) = named["candidates"].tolist(), named["accept_token_num"].tolist()
    (children,), (siblings,) = named["retrive_next_token"].tolist(), named["retrive_next_sibling"].tolist()
    parents = [-1] * len(tokens)
    for node in range(len(tokens)):
        child = children[node]
        while child != -1:
            parents[child] = node
            child = siblings[child]
    with open(os.environ[ROUNDS_VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps({"tokens": tokens, "parents": parents, "accepted": accepted}) + "\n")


sgl_kernel.verify_tree_greedy_cpu = recording_verify


def generate(job, rounds_path):
    """New tokens and rounds of each prompt."""
    import sglang

    started = time.perf_counter()
    engine = sglang.Engine(
        **job["engine"],
        device="cpu",
        attention_backend="intel_amx",
        max_total_tokens=4096,  # without it SGLang takes most of the memory
        max_running_requests=4,
        skip_tokenizer_init=True,
        log_level="warning",
    )
    sampling = {"temperature": 0, "max_new_tokens": job["max_tokens"], "ignore_eos": True}
    result = {"outputs": [], "rounds": [], "version": sglang.__version__}
    print(f"started in {time.perf_counter() - started:.0f} s", flush=True)
    for prompt in job["prompts"]:
        before = rounds_path.stat().st_size
        result["outputs"].append(engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"])
        with rounds_path.open(encoding="utf-8") as file:
            file.seek(before)
            result["rounds"].append([json.loads(line) for line in file])
    print(f"generated after {time.perf_counter() - started:.0f} s", flush=True)
    engine.shutdown()
    return result


def main(job_path, result_path):
    rounds_path = Path(result_path).with_suffix(".rounds")
    rounds_path.touch()
    os.environ[ROUNDS_VARIABLE] = str(rounds_path)
    result = generate(json.loads(Path(job_path).read_text(encoding="utf-8")), rounds_path)
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
