"""Training steps of speculators or SpecForge, inside their environment: one for each line on standard input.

`training_cost_job.py PEER FOLDER DTYPE OPTIMIZER HEAD`: its EAGLE-3 drafter, loss and optimizer, with what
training_cost.py left in FOLDER. A line of JSON answers each: losses of the unrolled steps, seconds on the clock, and
seconds that the process computed.
"""

import itertools
import json
import os
import sys
import time
import types
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

STEPS = 3  # of the training-time test
LEARNING_RATE = 1e-4
ATTENTION = "sdpa"  # flex attention has no gradients on a CPU
SEQUENCES = "sequences.safetensors"


class RecordedSequences:
    """The rows of record folders end to end, their states read from the disk when they are asked for.

    A row is tokens `[S]`, chosen states `[S, 3*h]`, last states `[S, h]` and which states' next tokens are learned
    `[S]`.
    """

    def __init__(self, *folders):
        self.rows, self.lengths, self.layers = [], [], []
        for folder in map(Path, folders):
            manifest, sequences = json.loads((folder / "record.json").read_text()), load_file(folder / SEQUENCES)
            self.layers, lengths = manifest["layer_ids"], sequences["lengths"].tolist()
            tokens, masks = sequences["input_ids"].long().split(lengths), sequences["loss_mask"].split(lengths)
            for number, (first, end) in enumerate(itertools.pairwise(manifest["shard_starts"])):
                shard, offset = safe_open(folder / f"states-{number:05d}.safetensors", framework="pt"), 0
                for row in range(first, end):
                    span = slice(offset, offset + lengths[row])
                    offset = span.stop
                    learned = torch.cat([masks[row][1:], masks[row][:1] & False])
                    self.rows.append((shard, span, tokens[row], learned))
            self.lengths += lengths

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        shard, span, tokens, learned = self.rows[row]
        states = [shard.get_slice(name)[span] for name in [*(f"layer.{layer}" for layer in self.layers), "last"]]
        return tokens, torch.cat(states[:-1], dim=-1), states[-1], learned


class Speculators:
    """What the loop of `speculators.train.trainer` does, with its own batch, model, loss and optimizers."""

    def __init__(self, folder, dtype, optimizer, head):
        from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
        from speculators.models.eagle3.data import shift_batch
        from speculators.train.data import CollateFn
        from speculators.train.optimizers import build_optimizers
        from speculators.train.trainer import TrainerConfig

        config = Eagle3SpeculatorConfig.from_pretrained(folder / "speculators")
        config.transformer_layer_config._attn_implementation = ATTENTION
        self.model = Eagle3DraftModel.from_pretrained(folder / "speculators", config=config).float().train()
        self.model.verifier_norm = torch.nn.Identity()  # the recorded last states are after the norm
        self.model.lm_head.weight.requires_grad_(head == "trained")
        self.loss_arguments, _ = self.model.get_trainer_kwargs(
            loss_fn="kl_div", loss_implementation="eager", ttt_steps=STEPS, ttt_step_loss_decay=1.0
        )
        settings = TrainerConfig(LEARNING_RATE, 1, "", optimizer=optimizer, hidden_states_dtype=dtype)
        self.optimizers, self.dtype = build_optimizers(self.model, settings), dtype
        items = [
            {
                "input_ids": tokens,
                "hidden_states": chosen,
                "verifier_last_hidden_states": last,
                "loss_mask": learned,
                "lengths": torch.tensor([len(tokens)]),
                "position_ids": torch.arange(len(tokens)),
            }
            for tokens, chosen, last, learned in RecordedSequences(folder / "record")
        ]
        total, hidden = sum(len(item["input_ids"]) - 1 for item in items), self.model.hidden_size
        batch = CollateFn(total, hidden, 3, dtype, shift_batch)(items)
        self.batch = {name: tensor for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}

    def gradients(self):
        with torch.autocast("cpu", dtype=self.dtype):
            _, loss, metrics = self.model(**self.batch, **self.loss_arguments)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        return [metrics[f"loss_{step}_sum"].item() for step in range(STEPS)]

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()


class SpecForge:
    """SpecForge's own model, training strategy and optimizer, which is AdamW whatever is asked for.

    Its loss is a Triton kernel, which needs a GPU: the plain function beside it, of the same values, takes its place.
    """

    def __init__(self, folder, dtype, optimizer, head):
        from specforge.algorithms.eagle3 import model as eagle3
        from specforge.core.loss import _compute_loss
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from specforge.modeling.target.target_head import TargetHead
        from specforge.optimizer import BF16Optimizer
        from specforge.runtime.contracts import TrainBatch
        from specforge.training.strategies.base import Eagle3TrainStrategy
        from specforge.utils import padding
        from transformers import LlamaConfig

        eagle3.LogSoftmaxLoss = types.SimpleNamespace(apply=_compute_loss)
        drafter = LlamaForCausalLMEagle3(LlamaConfig.from_pretrained(folder / "eagle3"), attention_backend=ATTENTION)
        drafter.load_state_dict(load_file(folder / "eagle3" / "model.safetensors"))
        drafter.freeze_embedding()
        drafter.lm_head.weight.requires_grad_(head == "trained")
        target_head = TargetHead(folder / "record")  # its own loading knows no tied embeddings
        weights = load_file(folder / "record" / "target.safetensors")
        target_head.fc.weight.data = weights.get("head.weight", weights["embeddings.weight"])
        target_head.freeze_weights()
        model = eagle3.OnlineEagle3Model(drafter.to(dtype).train(), length=STEPS, attention_backend=ATTENTION)
        self.strategy = Eagle3TrainStrategy(model, target_head=target_head.to(dtype), ploss_decay=1.0)
        self.optimizer = BF16Optimizer(drafter, LEARNING_RATE, max_grad_norm=1.0, warmup_ratio=0.0)
        tokens, chosen, last, learned = map(torch.stack, zip(*RecordedSequences(folder / "record"), strict=True))
        batch = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "loss_mask": padding(learned, left=False).long(),  # the only one that its step does not shift
            "hidden_state": chosen.to(dtype),
            "target": last.to(dtype),
        }
        self.batch = TrainBatch([], "eagle3", batch, {"target_repr": "hidden_state"})

    def gradients(self):
        found = self.strategy.forward_loss(self.batch)
        found.loss.backward()
        return [loss.item() for loss in found.metrics["plosses"]]

    def update(self):
        self.optimizer.step()


PEERS = {"speculators": Speculators, "specforge": SpecForge}


def clocks():
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def main(peer, folder, dtype, optimizer, head):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    step = PEERS[peer](Path(folder), getattr(torch, dtype), optimizer, head)
    for _ in sys.stdin:
        began = clocks()
        losses = step.gradients()
        gradients = clocks()
        step.update()
        spent = {"gradients": (gradients - began).tolist(), "update": (clocks() - gradients).tolist()}
        answers.write(json.dumps({"losses": losses, **spent}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
