"""speculators' EAGLE-3 training by its own recipe, inside its environment: see peer_training.py.

Model, start, packing, loss, optimizers and their numbers are the defaults of its command line. Its trainer class needs
a GPU, so that the loop is here; it ends when it has computed for so many seconds.
"""

import argparse
import inspect
import itertools
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from training_cost_job import RecordedSequences

WARM_UP = 0.01  # of the training, the default of its scheduler


def its_arguments(given, layers):
    """All arguments of its command line: its defaults, and what this machine and these states need."""
    from speculators.train.config import TrainConfig

    named = {
        "speculator_type": "eagle3",
        "verifier_name_or_path": given.target,
        "target_layer_ids": layers,
        "total_seq_len": given.total_seq_len,
        "seed": given.seed,
        "hidden_states_dtype": given.dtype,
        "draft_attn_impl": given.attention,  # its way for hardware without flex attention
        "loss_implementation": "eager",  # the fused one is of Triton
        "full_attention_indices": [0],  # the same as its window of 2,048 tokens where texts are shorter
        "mask_token_id": 0,  # not read by eagle3
    }
    return argparse.Namespace(**TrainConfig.from_flat(named).flatten())


def build_model(args, vocabulary):
    """Its untrained drafter of `args`, begun from the target as it does."""
    from speculators.models.eagle3 import Eagle3DraftModel
    from speculators.train.cli import build_draft_model, set_seed

    set_seed(args.seed)
    tables = load_file(vocabulary)
    model = build_draft_model(args, Eagle3DraftModel, tables["t2d"], tables["d2t"], len(tables["d2t"]))
    model.verifier_norm = torch.nn.Identity()  # the recorded last states are after the norm
    return model.float().train()


def orthogonalize_in_float32():
    """Have PyTorch's Muon compute in float32: it casts to bfloat16, some fifty times slower on a CPU without it."""
    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    exec(source.replace("grad.bfloat16()", "grad.float()"), vars(_muon))


class Batches:
    """Its packed batches of the rows, epoch after epoch."""

    def __init__(self, args, rows, hidden_size, layers):
        from speculators.models.eagle3.data import shift_batch
        from speculators.train.data import CollateFn
        from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2

        self.rows = rows
        lengths = rows.lengths
        self.sampler = MultipackDistributedBatchSamplerV2(args.total_seq_len, lengths, 1, 0, seed=args.seed)
        dtype = getattr(torch, args.hidden_states_dtype)
        self.collate = CollateFn(args.total_seq_len, hidden_size, len(layers), dtype, shift_batch)

    def row(self, number):
        tokens, chosen, last, learned = self.rows[number]
        return {
            "input_ids": tokens,
            "hidden_states": chosen,
            "verifier_last_hidden_states": last,
            "loss_mask": learned,
            "lengths": torch.tensor([len(tokens)]),
            "position_ids": torch.arange(len(tokens)),
        }

    def __iter__(self):
        for epoch in itertools.count():
            self.sampler.set_epoch(epoch)
            for numbers in self.sampler:
                batch = self.collate([self.row(int(number)) for number in numbers])
                yield {name: tensor for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}


def rate_factor(progress):
    """Its linear schedule at a share of the training: up from 0, then down to 0."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def train(model, args, batches, core_seconds):
    """Its trainer's loop until the process has computed for `core_seconds`; what was done, and each step's loss."""
    from speculators.train.optimizers import build_optimizers

    loss_arguments, _ = model.get_trainer_kwargs(**vars(args))
    optimizers = build_optimizers(model, args)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["full_lr"] = group["lr"]
    dtype = getattr(torch, args.hidden_states_dtype)
    began, tokens, losses = time.process_time(), 0, []
    for batch in batches:
        progress = min((time.process_time() - began) / core_seconds, 1.0)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["full_lr"] * rate_factor(progress)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            _, loss, _ = model(**batch, **loss_arguments)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += int((batch["document_ids"] != -1).sum())
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}, {progress:.1%}: loss {sum(losses[-10:]) / 10:.4f}", flush=True)
        if time.process_time() - began >= core_seconds:
            break
    seconds = time.process_time() - began
    return {"steps": len(losses), "tokens": tokens, "core_seconds": seconds, "losses": losses}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="folder of the target")
    parser.add_argument("--target-states", nargs="+", required=True, help="folders of recorded states")
    parser.add_argument("--vocabulary", required=True, help="d2t and t2d of the draft vocabulary")
    parser.add_argument("--core-seconds", type=float, required=True)
    parser.add_argument("--total-seq-len", type=int, required=True, help="tokens of a packed batch")
    parser.add_argument("--dtype", default="bfloat16", help="that it computes in")
    parser.add_argument("--attention", default="sdpa", help="its implementation of attention")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = RecordedSequences(*given.target_states)
    args = its_arguments(given, rows.layers)
    model = build_model(args, given.vocabulary)
    if given.dtype == "float32":
        orthogonalize_in_float32()
    done = train(model, args, Batches(args, rows, model.hidden_size, rows.layers), given.core_seconds)
    model.save_pretrained(given.output_dir)
    recipe = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str | list)}
    (given.output_dir / "training.json").write_text(json.dumps({**done, "recipe": recipe}, indent=1) + "\n")


if __name__ == "__main__":
    main()
