"""EAGLE-3 drafters by our default recipe and by speculators' own, from the same states, in the same core seconds.

    python tests/engines/peer_training.py --target MODEL --target-states R... --core-seconds 900 --output-dir D

speculators' runs in the interpreter that PPOW_VLLM_PYTHON names (make_environment.sh). Both keep the same draft
vocabulary, compute on one thread, in bfloat16 where this machine is faster so and else in float32, and have their
learning rate fall over the budget. Then, or alone with --only compare, D/ours and D/speculators-imported draft along
the same texts of the target, after each --prompts.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from ppow_hf import PPOWDrafter, import_drafter
from ppow_hf.data.models import load_prompts, load_target, load_tokenizer, parse_workload, resolve
from ppow_hf.measure.costs import faster_dtype
from ppow_hf.serving.engine_process import engine_python
from ppow_hf.serving.vllm_runner import PYTHON_VARIABLE
from ppow_hf.studies.compare import make_trainer
from ppow_hf.studies.evaluation import evaluate_drafter, write_texts
from ppow_hf.studies.report import paired_gain, value
from ppow_hf.training import PPOWTrainingArguments
from ppow_hf.training.budget import Budget
from ppow_hf.training.recorded_states import StateRecord

JOB = Path(__file__).with_name("peer_training_job.py")
SIDES = ("ours", "speculators")
NEW_TOKENS = 96


def new_drafter(target: Any, record: StateRecord, draft_vocab_size: int, seed: int) -> PPOWDrafter:
    """Our untrained drafter with the most frequent tokens of the record's texts."""
    torch.manual_seed(seed)
    counts = record.sequences.count_tokens(target.config.get_text_config().vocab_size)
    return PPOWDrafter.from_target(
        target, "eagle", draft_vocab_size, counts, target_layer_ids=record.layer_ids,
        target_name_or_path=record.manifest["target"],
    ).float()  # fmt: skip


def train_ours(given: argparse.Namespace, target: Any, drafter: PPOWDrafter, record: StateRecord) -> dict[str, Any]:
    """Train by our default recipe and save in D/ours; what was done."""
    budget = Budget("core_seconds", given.core_seconds)
    settings = {
        "objective": PPOWTrainingArguments.objective,
        "muon": None,  # the default of training, where that of `train` is AdamW alone
        "per_device_train_batch_size": given.batch_size,
        "bf16": target.dtype == torch.bfloat16,
    }
    rate, folder = PPOWTrainingArguments.learning_rate, given.output_dir / "ours"
    trainer = make_trainer(drafter, target, record, settings, budget, rate, given.seed, folder, record.max_length)
    trainer.train()
    drafter.save_pretrained(folder)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    steps = trainer.state.global_step
    return {"steps": steps, "tokens": budget.tokens, "core_seconds": budget.seconds, "losses": losses}


def train_speculators(given: argparse.Namespace, target: Any, drafter: PPOWDrafter) -> dict[str, Any]:
    """Train by speculators' recipe in D/speculators, and import it as D/speculators-imported; what was done.

    Raises `RuntimeError` if its process fails.
    """
    python = engine_python("speculators", PYTHON_VARIABLE, "run tests/engines/make_environment.sh", given.python)
    folder, vocabulary = given.output_dir / "speculators", given.output_dir / "vocabulary.safetensors"
    save_file({"d2t": drafter.d2t.cpu(), "t2d": drafter.t2d.cpu()}, vocabulary)
    words = [
        *("--target", resolve(given.target), "--target-states", *given.target_states, "--vocabulary", vocabulary),
        *("--core-seconds", given.core_seconds, "--total-seq-len", given.total_seq_len, "--seed", given.seed),
        *("--output-dir", folder, "--dtype", str(target.dtype).removeprefix("torch.")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    finished = subprocess.run([python, str(JOB), *map(str, words)], env=environment, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"speculators' training failed: {JOB.name} exited with {finished.returncode}.")
    import_drafter(folder, given.target).save_pretrained(given.output_dir / "speculators-imported")
    return json.loads((folder / "training.json").read_text())


def report(given: argparse.Namespace, side: str, done: dict[str, Any]) -> None:
    """Print what `side` did, and keep it in D."""
    (given.output_dir / f"{side}.json").write_text(json.dumps(done, indent=1) + "\n")
    tokens, seconds = done["tokens"], done["core_seconds"]
    losses = " to ".join(f"{loss:.3f}" for loss in (*done["losses"][:1], *done["losses"][-1:]))
    print(
        f"{side}: {done['steps']} steps, {tokens} tokens, {seconds:.1f} core seconds, "
        f"{tokens / seconds:.0f} tokens per core second, loss {losses}"
    )


def compare(given: argparse.Namespace, target: Any) -> None:
    """Print both drafters' acceptance lengths in chains of ten, and what ours gains, with its 95% interval."""
    tokenizer = load_tokenizer(given.target, "--target")
    folders = {"ours": "ours", "speculators": "speculators-imported"}
    drafters = {side: PPOWDrafter.from_pretrained(given.output_dir / folders[side]) for side in SIDES}
    for name, source in map(parse_workload, given.prompts):
        prompts = load_prompts(source, given.num_prompts, tokenizer, target, NEW_TOKENS, chat=True)
        texts = write_texts(target, [ids[0].tolist() for ids in prompts], NEW_TOKENS, given.seed)
        found = {
            side: evaluate_drafter(target, drafter, texts, groups=(), cost_ratios=())["per_prompt"]
            for side, drafter in drafters.items()
        }
        for kind in ("chain_t0_k10", "chain_t1_k10"):
            ours, peers = (numpy.array([found[side][kind]]) for side in SIDES)
            gain, low, high = paired_gain(ours, peers)
            interval = f"{gain:+.1%} ({low:+.1%} to {high:+.1%})"
            print(f"{name} {kind}: ours {value(ours):.3f}, speculators {value(peers):.3f}, {interval}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", required=True)
    parser.add_argument("--target-states", nargs="+", required=True, help="folders of ppow record")
    parser.add_argument("--core-seconds", type=float, default=900, help="of each training")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=8, help="our sequences of a step")
    parser.add_argument("--total-seq-len", type=int, default=1024, help="tokens of speculators' packed batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*SIDES, "compare"], help="do this alone, as on two cores at once")
    parser.add_argument("--prompts", action="append", default=[], help="[NAME=]DATA of prompts, several times")
    parser.add_argument("--num-prompts", type=int, default=25, help="of each")
    parser.add_argument("--python", help=f"speculators' interpreter; by default {PYTHON_VARIABLE}")
    given = parser.parse_args()
    if given.only == "compare" and not given.prompts:
        parser.error("--prompts: none given; --only compare needs prompts to compare on.")
    torch.set_num_threads(1)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    record = StateRecord(*given.target_states)
    target = load_target(given.target, dtype=faster_dtype("cpu"), device="cpu")
    drafter = new_drafter(target, record, given.draft_vocab_size, given.seed)
    if given.only in (None, "speculators"):
        report(given, "speculators", train_speculators(given, target, drafter))
    if given.only in (None, "ours"):
        report(given, "ours", train_ours(given, target, drafter, record))
    if given.only in (None, "compare"):
        compare(given, target)


if __name__ == "__main__":
    main()
