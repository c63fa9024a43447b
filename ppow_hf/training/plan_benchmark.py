"""The peak memory that `ppow plan` computes against the one measured, of trainings in float32 on the CPU.

Run it: `python -m ppow_hf.training.plan_benchmark`. Each shape trains a few steps on random text in a process of its
own, with the target beside the drafter; measured is the highest resident memory above what a tiny training left.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..data.sequences import SequenceDataset
from .arguments import PPOWTrainingArguments
from .plan import Machine, Shape, make_plan, meta_drafter
from .trainer import PPOWTrainer

SHAPES = {
    "wide": (
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 32_000},
        Shape("eagle", 512, batch=2, mixed=False),
    ),
    "long": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49_152},
        Shape("eagle", 2048, draft_vocab_size=8192, mixed=False),
    ),
}  # fmt: skip
TINY = (
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
     "num_key_value_heads": 1, "vocab_size": 100},
    Shape("eagle", 16, mixed=False),
)  # fmt: skip


def target_config(fields: dict) -> LlamaConfig:
    return LlamaConfig(**fields, max_position_embeddings=4096, tie_word_embeddings=False, dtype="float32")


def train(fields: dict, shape: Shape) -> None:
    """Three steps on random text, so that the last ones have the optimizer's state beside them."""
    target = LlamaForCausalLM(target_config(fields))
    with torch.device("meta"):
        pattern = meta_drafter(target, shape)
    drafter = type(pattern)(pattern.config)
    vocab_size = fields["vocab_size"]
    rows = [torch.randint(vocab_size, (shape.length,)) for _ in range(3 * shape.batch)]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOWTrainingArguments(
            folder, objective="supervised", unroll_steps=shape.steps, text_weighting="decay", max_steps=3,
            use_cpu=True, max_length=shape.length, per_device_train_batch_size=shape.batch,
            chunk_size=shape.chunk_size, cost_ratio=0.1, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        data = SequenceDataset(rows, [[True] * shape.length] * len(rows))
        PPOWTrainer(drafter, target, args, train_dataset=data).train()


def measure(name: str) -> int:
    """Peak bytes of a shape's training, in this process."""
    import psutil

    train(*TINY)
    before = psutil.Process().memory_info().rss
    train(*SHAPES[name])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def compare(name: str) -> dict[str, float]:
    """Planned and measured bytes of a shape."""
    fields, shape = SHAPES[name]
    plan = make_plan(target_config(fields), shape, Machine(1e12, 1e11))
    command = [sys.executable, "-m", "ppow_hf.training.plan_benchmark", "--measure", name]
    # Freed memory goes back at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    measured = json.loads(done.stdout.splitlines()[-1])
    return {"planned": plan.peak("whole"), "measured": measured, **asdict(plan)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", choices=list(SHAPES), help="train this shape here and print its peak")
    given = parser.parse_args()
    if given.measure:
        print(measure(given.measure))
        return
    for name in SHAPES:
        found = compare(name)
        planned, measured = found["planned"] / 2**30, found["measured"] / 2**30
        print(f"{name:<6} planned {planned:5.2f} GiB   measured {measured:5.2f} GiB   ratio {planned / measured:.3f}")


if __name__ == "__main__":
    main()
