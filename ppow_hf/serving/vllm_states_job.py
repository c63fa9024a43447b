"""A vLLM that writes the hidden states of lists of token sequences to files until its input ends.

Executed by its path with the interpreter of the environment that vLLM is in (`python vllm_states_job.py ENGINE FD`),
so it imports vLLM and the standard library only, never the package it lies in.

`ENGINE` is JSON of arguments of `vllm.LLM`, with `layer_ids` (counted as transformers' `hidden_states`, the last one
before the final norm) and the `folder` of the files. Each line of the input is a list of token sequences. File
descriptor `FD` takes `{}` once the engine is ready, and then for each line of the input the sequences' files, whose
tensor `hidden_states` is `[S, layers, h]`.
"""

import fcntl
import json
import os
import sys


def main(engine, answers_descriptor):
    import vllm
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform

    options = json.loads(engine)
    layers, folder = options.pop("layer_ids"), options.pop("folder")
    connector = {"kv_connector": "ExampleHiddenStatesConnector"}
    if current_platform.is_cpu():
        connector = {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": "vllm_cpu_connector"}
    llm = vllm.LLM(
        enforce_eager=current_platform.is_cpu(),
        enable_prefix_caching=False,  # whose sequences' states would be those of another's file
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        kv_transfer_config={
            **connector,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": folder},
        },
        **options,
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    with os.fdopen(int(answers_descriptor), "w", encoding="utf-8") as answers:
        answers.write("{}\n")
        answers.flush()
        for line in sys.stdin:
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(line)]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":  # else the engine goes on by itself
                while llm.llm_engine.engine_core.engine_core.scheduler.has_requests():
                    llm.llm_engine.step()  # which writes what has finished
            paths = [output.kv_transfer_params["hidden_states_path"] for output in outputs]
            for path in paths:
                with open(f"{path}.lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_SH)  # until it is written
                os.unlink(f"{path}.lock")
            answers.write(json.dumps(paths) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
