"""A vLLM that answers lists of requests until its input ends.

Executed by its path with the interpreter of the environment that vLLM is in (`python vllm_write_job.py ENGINE FD`), so
it imports vLLM and the standard library only, never the package it lies in.

`ENGINE` is JSON of arguments of `vllm.LLM`, and `cpu_dtype`, the number format on a CPU. Each line of the input is a
list of requests: `prompt_ids`, `temperature`, `max_tokens`, `stop_token_ids`. File descriptor `FD` takes
`{"context_length": ...}` once the engine is ready. Then for each line of the input it takes lines with the number of
requests answered so far, and one with the new token ids of every request, through the one that stops.
"""

import json
import os
import sys


def main(engine, answers_descriptor):
    import vllm
    from tqdm import tqdm
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform

    # The longest context that fits in memory; and on a CPU no compilation, which takes minutes there.
    arguments = {"max_model_len": -1, "enforce_eager": current_platform.is_cpu(), **json.loads(engine)}
    cpu_dtype = arguments.pop("cpu_dtype")
    if current_platform.is_cpu() and cpu_dtype:
        arguments["dtype"] = cpu_dtype
    with os.fdopen(int(answers_descriptor), "w", encoding="utf-8") as answers:

        def answer(line):
            answers.write(json.dumps(line) + "\n")
            answers.flush()

        class Answered(tqdm):  # how vLLM says that requests are done
            def update(self, n=1):
                if self.iterable is None:  # that of another of vLLM's bars
                    answer(self.n + n)
                return super().update(n)

        llm = vllm.LLM(**arguments)
        answer({"context_length": llm.llm_engine.model_config.max_model_len})
        for line in sys.stdin:
            requests = json.loads(line)
            prompts = [TokensPrompt(prompt_token_ids=request["prompt_ids"]) for request in requests]
            params = [
                vllm.SamplingParams(
                    temperature=request["temperature"],
                    max_tokens=request["max_tokens"],
                    stop_token_ids=request["stop_token_ids"],
                    ignore_eos=True,  # the ends of sequence are among those
                    detokenize=False,
                )
                for request in requests
            ]
            outputs = llm.generate(prompts, params, use_tqdm=Answered)
            answer([list(output.outputs[0].token_ids) for output in outputs])


if __name__ == "__main__":
    main(*sys.argv[1:3])
