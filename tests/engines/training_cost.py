"""Tokens/s of a supervised EAGLE-3 training step: ours beside those of speculators' and SpecForge's own code.

    python tests/engines/training_cost.py --python FOLDER/bin/python      (make_environment.sh FOLDER)

All train the same drafter by KL(P||Q) of three unrolled steps on the same recorded states, of a random target in the
shape of SmolLM2-135M. They take turns, one step each, so that a slow machine slows all. One thread each.

SpecForge compiles within its first step, which takes minutes and is not counted. Its update is AdamW whatever
--optimizer says, and its KL leaves out the entropy of P, which has no gradient.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from training_cost_job import PEERS, STEPS, clocks
from transformers import LlamaConfig, LlamaForCausalLM

from ppow_hf import PPOWDrafter
from ppow_hf.data.models import load_tokenizer
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.export import export_drafter
from ppow_hf.serving.engine_process import engine_python
from ppow_hf.serving.vllm_runner import PYTHON_VARIABLE
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.recorded_states import StateRecord
from ppow_hf.training.recording import Recording

JOB = Path(__file__).with_name("training_cost_job.py")
LAYERS = [1, 2, 3]
Answer = dict[str, list[float]]


def write_states(folder: Path, target: Any, drafter: PPOWDrafter, sequences: SequenceDataset, dtype: str) -> None:
    """Record `target`'s states along `sequences` in `folder`, with `drafter` in the peers' formats beside them."""
    for part in ("record", "speculators", "eagle3"):
        (folder / part).mkdir(parents=True)
    length = max(len(sequences[row]["input_ids"]) for row in range(len(sequences)))
    layers = drafter.config.target_layer_ids
    recording = Recording(target, load_tokenizer("tiny"), sequences, layers, length, getattr(torch, dtype))
    recording.record(folder / "record", recording.open_folder(folder / "record"), lambda tokens: None)
    target.save_pretrained(folder / "target")
    name = str(folder / "target")
    export_drafter(drafter, folder / "speculators", "speculators", target=target, target_name=name)
    export_drafter(drafter, folder / "eagle3", "sglang", target=target, target_name=name)
    path = folder / "speculators" / "config.json"  # which names the target without its folder
    fields = json.loads(path.read_text())
    fields["speculators_config"]["verifier"]["name_or_path"] = name
    path.write_text(json.dumps(fields))


class Ours:
    """Our trainer's step, from recorded states."""

    def __init__(self, folder: Path, drafter: PPOWDrafter, dtype: str, optimizer: str, head: str, steps: int = STEPS):
        record = StateRecord(folder / "record")
        args = PPOWTrainingArguments(
            str(folder / "run"), per_device_train_batch_size=len(record.sequences), objective="kl", unroll_steps=steps,
            num_anchors=2048, unroll_decay=1.0, text_weighting="decay", muon=0.0 if optimizer == "adamw" else None,
            bf16=dtype == "bfloat16", max_length=2048, use_cpu=True, report_to=[],
        )  # fmt: skip
        drafter = copy.deepcopy(drafter).train()
        drafter.draft_model.lm_head.weight.requires_grad_(head == "trained")
        self.trainer = PPOWTrainer(drafter, args=args, target_states=record)
        self.trainer.create_optimizer()
        rows = self.trainer.train_dataset
        batch = self.trainer.data_collator([rows[row] for row in range(len(rows))])
        self.inputs = self.trainer._prepare_inputs(batch)

    def gradients(self) -> list[float]:
        self.trainer.optimizer.zero_grad()
        loss = self.trainer.compute_loss(self.trainer.model, self.inputs)
        loss.backward()
        return [loss.item()]

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()

    def step(self) -> Answer:
        began = clocks()
        losses = self.gradients()
        gradients = clocks()
        self.update()
        return {
            "losses": losses,
            "gradients": (gradients - began).tolist(),
            "update": (clocks() - gradients).tolist(),
        }

    def close(self) -> None:
        """Nothing is left behind."""


class Peer:
    """A peer's trainer in a process of its own, which waits between its steps."""

    def __init__(self, python: str, *words: str):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [python, str(JOB), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def step(self) -> Answer:
        """One training step. Raises `RuntimeError`, with the last lines that it printed, if it fails."""
        try:
            print("step", file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())  # type: ignore[union-attr]
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError("".join(self.log.readlines()[-15:])) from error

    def close(self) -> None:
        """End the process, which waits for its next line, and forget what it printed."""
        self.process.communicate()
        self.log.close()


def make_pair(given: argparse.Namespace, dtype: str) -> tuple[Any, PPOWDrafter, SequenceDataset]:
    """A random target, an untrained eagle drafter in float32, and random texts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab_size, hidden_size=576, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    target = LlamaForCausalLM(config).to(getattr(torch, dtype))
    reduced = {"draft_vocab_size": given.draft_vocab_size, "token_counts": torch.rand(given.vocab_size)}
    shape = {"target_layer_ids": LAYERS, "state_scales": None}  # what peers have no place for
    drafter = PPOWDrafter.from_target(target, "eagle", **shape, **reduced).float()
    texts = [torch.randint(given.vocab_size, (given.length,)) for _ in range(given.batch)]
    return target, drafter, SequenceDataset(texts, [[True] * given.length] * given.batch)


def make_ways(given: argparse.Namespace, folder: Path, drafter: PPOWDrafter, dtype: str) -> dict[str, Any]:
    """Who trains, by name."""
    python = engine_python("speculators", PYTHON_VARIABLE, "run tests/engines/make_environment.sh", given.python)
    ways: dict[str, Any] = {}
    for head in ("trained", "frozen"):
        ways[f"ours, head {head}"] = Ours(folder, drafter, dtype, given.optimizer, head)
    for peer in given.peers:
        for head in ("trained", "frozen"):
            ways[f"{peer}, head {head}"] = Peer(python, peer, str(folder), dtype, given.optimizer, head)
    return ways


def take_turns(ways: dict[str, Any], repeats: int) -> dict[str, list[Answer]]:
    """`repeats` steps of each way, and two before that are not counted; a way that fails is left out, and said so."""
    answers: dict[str, list[Answer]] = {way: [] for way in ways}
    for repeat in range(-2, repeats):
        for way in list(answers):
            try:
                answer = ways[way].step()
            except RuntimeError as error:
                print(f"{way} failed:\n{error}", file=sys.stderr)
                del answers[way]
                continue
            if repeat >= 0:
                answers[way].append(answer)
    for trainer in ways.values():
        trainer.close()
    return answers


def print_table(answers: dict[str, list[Answer]], tokens: int, title: str) -> None:
    """Medians of each way, and by what ours of the same head is faster."""
    names = ("tokens/s", "on the clock", "gradients ms", "update ms", "ours is x")
    print(f"{title}\n{'':<38}" + "".join(f"{name:>13}" for name in names))
    seconds = {
        way: [statistics.median(a["gradients"][kind] + a["update"][kind] for a in found) for kind in (0, 1)]
        for way, found in answers.items()
    }
    for way, found in answers.items():
        own = seconds[f"ours, head {'frozen' if 'frozen' in way else 'trained'}"][1]
        clock, computed = seconds[way]
        parts = [1e3 * statistics.median(a[part][1] for a in found) for part in ("gradients", "update")]
        print(
            f"{way:<38}{tokens / computed:13.0f}{tokens / clock:13.0f}{parts[0]:13.0f}{parts[1]:13.0f}"
            f"{computed / own:13.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", help=f"the peers' interpreter; by default {PYTHON_VARIABLE}")
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=3, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in given.dtype:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            target, drafter, sequences = make_pair(given, dtype)
            write_states(folder, target, drafter, sequences, dtype)
            answers = take_turns(make_ways(given, folder, drafter, dtype), given.repeats)
        tokens = given.batch * given.length
        title = f"{dtype}, {given.batch} x {given.length} tokens, {STEPS} steps, {given.optimizer}, computing seconds"
        print_table(answers, tokens, title)


if __name__ == "__main__":
    main()
