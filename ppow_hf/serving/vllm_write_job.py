"""A vLLM that answers lists of requests until its input ends.

Executed by its path with the interpreter of the environment that vLLM is in (`python vllm_write_job.py ENGINE FD`), so
it imports vLLM and the standard library only, never the package it lies in.

`ENGINE` is JSON of arguments of `vllm.LLM`. Each line of the input is a list of requests: `prompt_ids`,
`temperature`, `max_tokens`, `stop_token_ids`. File descriptor `FD` takes `{"context_length": ...}` once the engine
is ready, and then for each line of the input one with the new token ids of every request, through the one that stops.
"""

import json
import os
import sys


def main(engine, answers_descriptor):
    import vllm
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform

    # The longest context that fits in memory; and on a CPU no compilation, which takes minutes there.
    arguments = {"max_model_len": -1, "enforce_eager": current_platform.is_cpu(), **json.loads(engine)}
    with os.fdopen(int(answers_descriptor), "w", encoding="utf-8") as answers:
        llm = vllm.LLM(**arguments)
        answers.write(json.dumps({"context_length": llm.llm_engine.model_config.max_model_len}) + "\n")
        answers.flush()
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
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers.write(json.dumps([list(output.outputs[0].token_ids) for output in outputs]) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
