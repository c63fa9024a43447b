"""Peak memory of the drafter's loss, chunked as PPOWTrainer computes it against the plain computation.

Run it: `python -m ppow_hf.training.memory_benchmark`. Each way runs in a process of its own, on the CPU, and reports
the highest resident memory above what it had before; the losses and gradients must agree.
"""

import argparse
import json
import subprocess
import sys

import torch

from .chunks import sum_over_chunks
from .terms import forward_kl


def measure(way: str, vocab_size: int, length: int, hidden_size: int, chunk_size: int) -> dict[str, float]:
    """Loss, gradient norm and peak extra memory (GiB) of one forward and backward pass of KL(P||Q)."""
    import resource

    torch.manual_seed(0)
    head = torch.nn.Linear(hidden_size, vocab_size, bias=False)
    target_head = torch.nn.Linear(hidden_size, vocab_size, bias=False).requires_grad_(False)
    features = torch.randn(length, hidden_size, requires_grad=True)
    sources = torch.randn(length, hidden_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def chunk(features, sources):
        return forward_kl(target_head(sources), head(features)).sum()[None]

    if way == "chunked":
        loss = sum_over_chunks(chunk, chunk_size, head.parameters(), features, sources)[0]
    else:
        loss = chunk(features, sources)[0]
    loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert features.grad is not None
    return {
        "loss": loss.item() / length,
        "gradient_norm": features.grad.norm().item(),
        "peak_gib": (after - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab-size", type=int, default=128_000)
    parser.add_argument("--length", type=int, default=2048, help="positions, S")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--way", choices=["plain", "chunked"], help="run one way here and print it as JSON")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.vocab_size, given.length, given.hidden_size, given.chunk_size)))
        return
    results = {}
    for way in ("plain", "chunked"):
        command = [sys.executable, "-m", "ppow_hf.training.memory_benchmark", "--way", way]
        for name in ("vocab_size", "length", "hidden_size", "chunk_size"):
            command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
        results[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{way:<8} peak {results[way]['peak_gib']:6.2f} GiB   loss {results[way]['loss']:.6f}")
    print(f"ratio    {results['plain']['peak_gib'] / results['chunked']['peak_gib']:.1f}")


if __name__ == "__main__":
    main()
