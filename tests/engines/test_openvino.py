"""Exports in a real OpenVINO GenAI on a CPU, converted by the commands of their README, in float32.

The text is transformers', and the target runs as often as in our own decoding with a fixed window.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from engine_helpers import NEW_TOKENS, WINDOW, interpreter_or_skip

from ppow_hf import tiny
from ppow_hf.data.models import load_tokenizer
from ppow_hf.export import export_drafter
from ppow_hf.measure.evaluation import decode

pytestmark = pytest.mark.engines

PYTHON_VARIABLE = "PPOW_OPENVINO_PYTHON"


@pytest.fixture(scope="module")
def openvino_python():
    return interpreter_or_skip("OpenVINO", PYTHON_VARIABLE, "make_openvino_environment.sh")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def plain(target, prompts):
    """What transformers says without a drafter."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def run(command, folder, python):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(python).parent}{os.pathsep}{environment['PATH']}"
    finished = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        shell=isinstance(command, str),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def convert(readme, folder, python):
    """Run the commands of an exported folder's README, with the embedded target's folder in the first one."""
    block = readme.split("## OpenVINO GenAI")[1].split("```bash\n")[1].split("```")[0]
    first, *others = block.strip().splitlines()
    assert first.startswith("optimum-cli export openvino --model")
    if not (folder / "ov-target").is_dir():
        options = first[first.index("--task") :]
        run(f"optimum-cli export openvino --model {shlex.quote(str(tiny.target_path()))} {options}", folder, python)
    for line in others:
        run(line, folder, python)


def generate(python, folder, prompts, drafter=None):
    job = {"target": "ov-target", "drafter": drafter, "prompts": prompts, "max_tokens": NEW_TOKENS, "window": WINDOW}
    (folder / "job.json").write_text(json.dumps(job))
    run([python, str(Path(__file__).with_name("openvino_job.py")), "job.json", "result.json"], folder, python)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", ["eagle", "reduced-eagle", "standalone"])
def test_export_is_served_with_our_target_passes(
    name, openvino_python, folder, target, eagle, reduced_eagle, standalone, plain, prompts
):
    drafter = {"eagle": eagle, "reduced-eagle": reduced_eagle, "standalone": standalone}[name]
    tokenizer = load_tokenizer("tiny") if name == "standalone" else None
    export_drafter(drafter, folder / name, "openvino", target=target, target_name="tiny", tokenizer=tokenizer)
    readme = (folder / name / "README.md").read_text()
    convert(readme, folder, openvino_python)
    run([openvino_python, "-c", readme.split("```python\n")[-1].split("```")[0]], folder, openvino_python)
    result = generate(openvino_python, folder, prompts, f"ov-{name}")
    assert result["outputs"] == plain
    _, traces = decode(target, drafter, prompts, NEW_TOKENS, window="fixed", max_window=WINDOW)
    ours = [len(trace.rounds) for trace in traces]
    print(f"{name}: target passes {result['passes']}, ours {ours}; accepted {result['accepted']}")
    assert max(abs(theirs - own) for theirs, own in zip(result["passes"], ours, strict=True)) <= 1
    assert sum(result["accepted"]) >= NEW_TOKENS * len(prompts) // 2


def test_genai_without_a_drafter_says_what_transformers_says(openvino_python, folder, plain, prompts):
    assert generate(openvino_python, folder, prompts)["outputs"] == plain
