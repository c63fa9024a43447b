"""Whether two checkouts generate and train the same, bit for bit.

    python tests/equal_revisions.py OLD_CHECKOUT NEW_CHECKOUT

Runs the same cases with the embedded models in both, each in a process of its own and by the public interface only,
and compares tokens, traces (without times) and logged losses exactly. Prints a table; exit code 1 if anything differs.
Takes a few minutes on a CPU; pytest does not collect it.
"""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

PROMPTS = [
    'def read_lines(path):\n    """Return the lines of a file."""\n    with open(path) as file:\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\n\nfor name in os.listdir('.'):\n    if name.endswith('.py'):\n        print(name)\n    if name",
]
COSTS = {"cost_ratio": 0.12, "verification_cost": 0.04}
WINDOWS = {
    "kl": {"window": "kl"},
    "fixed": {"window": "fixed", "max_window": 6},
    "heuristic": {"window": "heuristic"},
    "kl, lookup": {"window": "kl", "lookup": True},
    "kl, dear drafts": {"window": "kl", "cost_ratio": 0.6, "verification_cost": 0.15},
}
TREES = {
    "tree, kl": {"window": "kl", "tree_nodes": 12, "tree_branches": 3},
    "tree, fixed": {"window": "fixed", "tree_nodes": 10, "tree_branches": 4, "max_window": 5},
}
TEMPERATURES = {"T=0": {"do_sample": False}, "T=1": {"do_sample": True, "temperature": 1.0, "top_k": 0}}
PROCESSORS = {"T=0, processors": {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 4}}
PROCESSORS |= {"T=1, processors": {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}}
TIMES = ("draft_seconds", "verify_seconds", "seconds")
OBJECTIVES = ("supervised", "tv", "ppow")
TRAINING = {
    "max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 0, "optim": "adamw_torch", "muon": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 3,
    "data_seed": 3, "save_strategy": "no", "eval_strategy": "no",
    "use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False, "fp16": False,
    "max_length": 64, "packing": True, "regenerate": False, "unroll_steps": 4,
    "unroll_decay": 0.9, "text_weighting": "visited", "max_window": 6, "num_rollouts": 4, "num_prefixes": 3,
    "num_anchors": 512,
    "rollout_temperature": 0.8, "target_temperature": 0.0, "verify_with": "target", "speedup_weight": 1.0,
    "throughput_weight": 0.0, "proximity_weight": 0.5, "proximity_threshold": 5.0, "clip_range": 0.2,
    "num_iterations": 1, "kl_coef": 0.1, "text_kl_coef": 1.0, "adaw_start": 0.5, "cost_ratio": 0.12,
    "chunk_size": 1024, "verify_tokens": 4096, "eval_prompts": 1, "calibrate_at_end": False,
}  # fmt: skip


# -- in a checkout's own process


def record(trace) -> dict:
    """A [`GenerationTrace`] without its times."""
    whole = dataclasses.asdict(trace)
    whole["rounds"] = [{name: value for name, value in r.items() if name not in TIMES} for r in whole["rounds"]]
    return whole


def generations(architecture: str):
    """Name and outcome (tokens, traces) of each generation case."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppow_hf import PPOWDrafter
    from ppow_hf.tiny import drafter_path, target_path

    tokenizer = AutoTokenizer.from_pretrained(target_path())
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    target = AutoModelForCausalLM.from_pretrained(target_path()).eval()
    drafter = PPOWDrafter.from_pretrained(drafter_path(f"tiny-{architecture}")).eval()
    alone = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    together = tokenizer(PROMPTS, return_tensors="pt", padding=True)

    def generate(inputs, way, settings, options):
        view = drafter.with_settings(**(COSTS | settings))
        given = {"assistant_model": view} if way == "assistant_model" else {"custom_generate": view.generate_with()}
        torch.manual_seed(1)
        output = target.generate(**inputs, **given, **options, max_new_tokens=40, pad_token_id=tokenizer.pad_token_id)
        if way == "assistant_model":
            traces = view.last_traces or [view.last_trace]
        else:
            traces = given["custom_generate"].last_traces
        return {"tokens": output.tolist(), "traces": [record(trace) for trace in traces]}

    for temperature, options in (TEMPERATURES | PROCESSORS).items():
        for name, settings in (WINDOWS | TREES).items():
            for way in ("assistant_model", "custom_generate"):
                outcomes = [generate(inputs, way, settings, options) for inputs in alone]
                yield f"{architecture} | {name} | {temperature} | {way} | alone", outcomes
                if way == "custom_generate":
                    outcome = generate(together, way, settings, options)
                    yield f"{architecture} | {name} | {temperature} | {way} | batch", outcome


def trainings(architecture: str):
    """Name and logged numbers of one short training for each objective."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppow_hf import PPOWDrafter
    from ppow_hf.tiny import drafter_path, target_path
    from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(target_path())
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.jsonl"
            data.write_text(json.dumps({"text": inspect.getsource(textwrap)}) + "\n")
            trainer = PPOWTrainer(
                PPOWDrafter.from_pretrained(drafter_path(f"tiny-{architecture}")),
                AutoModelForCausalLM.from_pretrained(target_path()).eval(),
                PPOWTrainingArguments(output_dir=f"{folder}/run", objective=objective, **TRAINING),
                train_dataset=str(data),
                processing_class=tokenizer,
            )
            trainer.train()
            rows = trainer.state.log_history
        timed = ("runtime", "per_second", "flos")
        kept = [{name: value for name, value in row.items() if not any(t in name for t in timed)} for row in rows]
        yield f"{architecture} | training | {objective}", kept


def work(results: Path) -> None:
    import ppow_hf

    outcomes = {"": str(Path(ppow_hf.__file__).parents[1])}
    for architecture in ("eagle", "standalone"):
        outcomes |= dict(generations(architecture)) | dict(trainings(architecture))
    results.write_text(json.dumps(outcomes))


# -- both


def outcomes_of(checkout: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        settings = {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(results)]
        subprocess.run(command, check=True, cwd=folder, env=os.environ | settings, stdout=subprocess.DEVNULL)
        outcomes = json.loads(results.read_text())
    imported = Path(outcomes.pop("")).resolve()
    if imported != checkout:
        raise RuntimeError(f"{checkout}: the package was imported from {imported} instead.")
    return outcomes


def known_fields(new, old):
    """`new` without the fields that dicts in its place in `old` do not have: traces and logs may tell more."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {name: known_fields(value, old[name]) for name, value in new.items() if name in old}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [known_fields(one, other) for one, other in zip(new, old, strict=True)]
    return new


def main(old: str, new: str) -> int:
    old_outcomes, new_outcomes = (outcomes_of(Path(checkout).resolve()) for checkout in (old, new))
    width = max(map(len, old_outcomes))
    different = 0
    for name, outcome in old_outcomes.items():
        # As text: NaN is the same as NaN, and a float's text is exact.
        new_outcome = known_fields(new_outcomes.get(name), outcome)
        equal = json.dumps(outcome, sort_keys=True) == json.dumps(new_outcome, sort_keys=True)
        different += not equal
        print(f"{name:<{width}}  {'equal' if equal else 'DIFFERENT'}")
    print(f"{len(old_outcomes)} cases, {different} different")
    return int(different > 0 or old_outcomes.keys() != new_outcomes.keys())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    elif len(sys.argv) == 3:
        sys.exit(main(*sys.argv[1:]))
    else:
        sys.exit(__doc__)
