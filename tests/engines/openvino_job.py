"""One run of prompts through OpenVINO GenAI, inside its own environment: `openvino_job.py JOB RESULT` (JSON).

A job: `target` and `drafter` (folders of converted models; the drafter's may be null), `prompts` (token ids),
`max_tokens`, `window`. A result: `outputs`, and of each prompt the target's `passes`, that over the prompt included,
and the draft tokens `accepted`; without a drafter GenAI counts neither.
"""

import json
import sys
from pathlib import Path

# Without these, GenAI rounds the activations or the cache where the processor computes that faster.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def main(job_path, result_path):
    import numpy
    import openvino
    import openvino_genai

    job = json.loads(Path(job_path).read_text())
    draft = {"draft_model": openvino_genai.draft_model(job["drafter"], "CPU", **FLOAT32)} if job["drafter"] else {}
    pipeline = openvino_genai.LLMPipeline(job["target"], "CPU", **draft, **FLOAT32)
    result = {"outputs": [], "passes": [], "accepted": []}
    for prompt in job["prompts"]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = job["max_tokens"], False, True
        if draft:
            config.num_assistant_tokens = job["window"]
        answer = pipeline.generate(openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config)
        result["outputs"].append(list(answer.tokens[0]))
        if draft:
            metrics = answer.extended_perf_metrics
            result["passes"].append(len(metrics.main_model_metrics.raw_metrics.m_durations))
            result["accepted"].append(metrics.get_num_accepted_tokens())
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
