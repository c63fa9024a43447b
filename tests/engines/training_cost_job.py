"""Training steps of speculators, inside its environment: one for each line on standard input.

`training_cost_job.py FOLDER DTYPE OPTIMIZER HEAD ATTENTION`: its EAGLE-3 drafter, loss and optimizer, with what
training_cost.py left in FOLDER. A line of JSON answers each: losses of the unrolled steps, seconds on the clock, and
seconds that the process computed.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS = 3  # of the training-time test
LEARNING_RATE = 1e-4


def recorded_sequences(folder):
    """Tokens `[S]`, chosen states `[S, 3*h]`, last states `[S, h]` and which states' next tokens are learned `[S]`."""
    sequences, states = load_file(folder / "sequences.safetensors"), load_file(folder / "states-00000.safetensors")
    lengths, last = sequences["lengths"].tolist(), states.pop("last")
    layers = sorted(states, key=lambda name: int(name.removeprefix("layer.")))
    chosen = torch.cat([states[name] for name in layers], dim=-1)
    learned = [torch.cat([mask[1:], mask[:1] & False]) for mask in sequences["loss_mask"].split(lengths)]
    return zip(sequences["input_ids"].long().split(lengths), chosen.split(lengths), last.split(lengths), learned,
               strict=True)  # fmt: skip


class Speculators:
    """What the loop of `speculators.train.trainer` does, with its own batch, model, loss and optimizers."""

    def __init__(self, folder, dtype, optimizer, head, attention):
        from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
        from speculators.models.eagle3.data import shift_batch
        from speculators.train.data import CollateFn
        from speculators.train.optimizers import build_optimizers
        from speculators.train.trainer import TrainerConfig

        config = Eagle3SpeculatorConfig.from_pretrained(folder / "speculators")
        config.transformer_layer_config._attn_implementation = attention
        self.model = Eagle3DraftModel.from_pretrained(folder / "speculators", config=config).float().train()
        self.model.verifier_norm = torch.nn.Identity()  # the recorded last states are behind the norm
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
            for tokens, chosen, last, learned in recorded_sequences(folder / "record")
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


def clocks():
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def main(folder, dtype, optimizer, head, attention):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    step = Speculators(Path(folder), getattr(torch, dtype), optimizer, head, attention)
    for _ in sys.stdin:
        began = clocks()
        losses = step.gradients()
        gradients = clocks()
        step.update()
        spent = {"gradients": (gradients - began).tolist(), "update": (clocks() - gradients).tolist()}
        answers.write(json.dumps({"losses": losses, **spent}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
