"""Tokens/s of a training step, against the same with the target's whole head, and with features of every prefix.

Run it: `python -m ppow_hf.training.step_benchmark`. Random weights in the shape of SmolLM2-135M, cut to a few layers;
the ways take turns in one process, and their losses must agree.
"""

import argparse
import statistics
import tempfile
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..data.sequences import SequenceDataset
from ..runtime.draft_session import now
from ..runtime.modeling_ppow import PPOWDrafter
from .arguments import PPOWTrainingArguments
from .trainer import PPOWTrainer

WAYS = ("whole head", "every prefix", "default")


def make_trainer(given: argparse.Namespace, folder: str) -> PPOWTrainer:
    """A trainer of an eagle drafter with a reduced vocabulary, on random text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab_size, hidden_size=576, intermediate_size=1536, num_hidden_layers=given.layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    target = LlamaForCausalLM(config).to(getattr(torch, given.dtype))
    counts = torch.rand(given.vocab_size)
    drafter = PPOWDrafter.from_target(
        target, "eagle", draft_vocab_size=given.draft_vocab_size, token_counts=counts
    ).float()
    sequences = [torch.randint(given.vocab_size, (given.length,)) for _ in range(given.batch)]
    args = PPOWTrainingArguments(
        output_dir=folder, max_length=given.length, per_device_train_batch_size=given.batch, report_to=[],
        objective=given.objective, cost_ratio=0.1, bf16=given.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    data = SequenceDataset(sequences, [[True] * given.length] * given.batch)
    trainer = PPOWTrainer(drafter, target, args, train_dataset=data)
    trainer.model.to(args.device).train()
    return trainer


def step(trainer: PPOWTrainer, inputs: dict[str, torch.Tensor], way: str) -> tuple[float, float]:
    """Loss and seconds of one forward and backward pass."""
    target, drafter = trainer.target, cast(PPOWDrafter, trainer.model)
    if way == WAYS[0]:
        vars(target)["_kept_logits"] = lambda sources, kept: target.logits(sources)[..., kept]
    if way == WAYS[1]:

        def every_prefix(ids, states, mask, prefixes, draft_ids, goes_on=None):
            def given(j, _, windows):
                return draft_ids[:, :, j].gather(1, windows)

            features, cache = drafter.prefix_features(ids, states)
            return drafter.unroll(features, cache, prefixes, given, draft_ids.shape[-1], goes_on)

        drafter.__dict__["window_features"] = every_prefix
    started = now(trainer.args.device)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    seconds = now(trainer.args.device) - started
    vars(target).pop("_kept_logits", None)
    drafter.__dict__.pop("window_features", None)
    trainer.model.zero_grad()
    return loss.item(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4, help="of the target")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--objective", default="supervised")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(given, folder)
        inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(given.batch)]))
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for repeat in range(given.repeats + 1):  # the first is warm-up
            for way in WAYS:
                result = step(trainer, inputs, way)
                if repeat:
                    found[way].append(result)
    seconds = {way: statistics.median(taken for _, taken in results) for way, results in found.items()}
    for way, results in found.items():
        speed = given.batch * given.length / seconds[way]
        print(f"{way:<18} {1e3 * seconds[way]:8.0f} ms a step {speed:8.0f} tokens/s   loss {results[0][0]:.6f}")
    ratios = ", ".join(f"{seconds[way] / seconds[WAYS[-1]]:.2f} over {way}" for way in WAYS[:-1])
    print(f"{'ratio':<18} {ratios}")


if __name__ == "__main__":
    main()
