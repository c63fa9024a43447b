"""One run of prompts through SGLang, described by a file and answered by a file.

Executed by its path with the interpreter of the environment that SGLang is in (`python sglang_job.py JOB RESULT`), so
it imports SGLang and the standard library only, never the package it lies in.

A job: `engine` (arguments of `sglang.Engine`), `prompts` (lists of token ids), `max_tokens`, `one_by_one` (each prompt
alone, or all together as the engine batches them), `ignore_eos`, `warm_up` (run the first prompt before the clock
starts). A result: as that of vllm_job.py, without the time that the engine's processes computed.
"""

import json
import sys
import time
from pathlib import Path


def main(job_path, result_path):
    import sglang

    job = json.loads(Path(job_path).read_text())
    engine = sglang.Engine(**job["engine"])
    sampling = {"temperature": 0, "max_new_tokens": job["max_tokens"], "ignore_eos": job["ignore_eos"]}
    prompts = job["prompts"]
    if job["warm_up"]:
        engine.generate(input_ids=prompts[0], sampling_params=sampling)
    started = time.perf_counter()
    if job["one_by_one"]:
        answers = [engine.generate(input_ids=prompt, sampling_params=sampling) for prompt in prompts]
    else:
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - started
    engine.shutdown()
    outputs = [answer["output_ids"] for answer in answers]
    result = {
        "outputs": outputs,
        "seconds": seconds,
        "tokens": sum(map(len, outputs)),
        "version": sglang.__version__,
        **counts([answer["meta_info"] for answer in answers]),
    }
    Path(result_path).write_text(json.dumps(result))


def counts(answers):
    """What the windows of all prompts drafted and kept."""
    kept: list[int] = []  # windows that kept 0, 1, 2, ... draft tokens
    for answer in answers:
        histogram = answer.get("spec_correct_drafts_histogram", [])
        kept += [0] * (len(histogram) - len(kept))
        for length, windows in enumerate(histogram):
            kept[length] += windows
    return {
        "drafts": sum(answer.get("spec_verify_ct", 0) for answer in answers),
        "drafted": sum(answer.get("spec_num_proposed_drafts", 0) for answer in answers),
        "accepted": sum(answer.get("spec_num_correct_drafts", 0) for answer in answers),
        "accepted_per_position": [sum(kept[position:]) for position in range(1, len(kept))],
    }


if __name__ == "__main__":
    main(*sys.argv[1:3])
