"""SGLang in an environment of its own, and its draft tokens beside ours, round by round."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from engine_helpers import NEW_TOKENS, WINDOW, OurRun

STAND_INS = Path(__file__).resolve().parent / "sglang_on_a_cpu"
ERROR_LINES = 15
TIMEOUT_SECONDS = 1200


@dataclass
class SglangRound:
    """One round: `tokens[0]` is the last committed token, the others are drafted and follow node `parents[i]`."""

    tokens: list[int]
    parents: list[int]
    accepted: int

    @property
    def drafted(self) -> list[int]:
        return self.tokens[1:]

    def paths(self) -> set[tuple[int, ...]]:
        """The drafted nodes, each as the tokens from the context to it."""
        return set(node_paths(self.drafted, [parent - 1 for parent in self.parents[1:]]))


@dataclass
class SglangRun:
    """New tokens and rounds of each prompt."""

    outputs: list[list[int]]
    rounds: list[list[SglangRound]]
    version: str

    @property
    def acceptance_length(self) -> float:
        rounds = [r for prompt in self.rounds for r in prompt]
        return 1 + sum(r.accepted for r in rounds) / len(rounds)


def run_job(python: str, job: str, arguments: list[str], folder: Path, **environment: str) -> None:
    """Run a script of this folder with SGLang's interpreter, which finds the stand-in and nothing of this process."""
    finished = subprocess.run(
        [python, str(STAND_INS.with_name(job)), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(STAND_INS), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    last = "\n".join(finished.stdout.strip().splitlines()[-ERROR_LINES:])
    assert finished.returncode == 0, f"{job} ended with exit code {finished.returncode}:\n{last}"


def run_sglang(
    python: str, folder: Path, model: Path, prompts: list[list[int]], speculative: dict | None = None
) -> SglangRun:
    """Generate `NEW_TOKENS` tokens greedily and one prompt after the other, in float32; files go to `folder`."""
    engine = {"model_path": str(model), "dtype": "float32", **(speculative or {})}
    job = {"engine": engine, "prompts": prompts, "max_tokens": NEW_TOKENS}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    run_job(python, "sglang_job.py", ["job.json", "result.json"], folder)
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    found["rounds"] = [[SglangRound(**r) for r in prompt] for prompt in found["rounds"]]
    run = SglangRun(**found)
    for output, rounds in zip(run.outputs, run.rounds, strict=True):
        committed = 1  # by the forward over the prompt
        for r in rounds:
            assert r.tokens[0] == output[committed - 1]
            committed += r.accepted + 1
    return run


def speculative(algorithm: str, folder: Path, branches: int = 1, nodes: int = WINDOW) -> dict:
    """SGLang's arguments for chains of `WINDOW` tokens, or trees of that depth."""
    return {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(folder),
        "speculative_num_steps": WINDOW,
        "speculative_eagle_topk": branches,
        "speculative_num_draft_tokens": nodes + 1,
    }


def node_paths(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """Each node of a tree as the tokens from the context (parent -1) to it."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def assert_same_rounds(sglang: SglangRun, ours: OurRun) -> None:
    """The same windows of draft tokens, and the same number of each kept, in every round of every prompt."""
    own = [[(r.draft_ids, r.accepted) for r in prompt] for prompt in ours.rounds]
    theirs = [[(r.drafted, r.accepted) for r in prompt] for prompt in sglang.rounds]
    pairs = [pair for a, b in zip(own, theirs, strict=True) for pair in zip(a, b, strict=False)]
    equal, total = sum(a == b for a, b in pairs), max(sum(map(len, own)), sum(map(len, theirs)))
    lengths = f"acceptance length: SGLang {sglang.acceptance_length:.3f}, ours {ours.acceptance_length:.3f}"
    print(f"{equal} of {total} rounds equal; {lengths}")
    assert total and own == theirs, f"SGLang drafts otherwise: {equal} of {total} rounds equal; {lengths}"


def assert_same_trees(sglang: SglangRun, ours: OurRun, most_different: float, most_nodes: int) -> None:
    """In at most a share `most_different` of the rounds, and by at most `most_nodes`, other nodes than ours."""
    differences = []
    for own, theirs in zip(ours.rounds, sglang.rounds, strict=True):
        assert [r.accepted for r in own] == [r.accepted for r in theirs]
        for one, other in zip(own, theirs, strict=True):
            paths = set(node_paths(one.draft_ids, one.parents))
            assert len(paths) == len(other.paths())
            differences.append(len(paths - other.paths()))
    different = [nodes for nodes in differences if nodes]
    print(f"{len(differences) - len(different)} of {len(differences)} trees equal; the others by {different} nodes")
    assert len(different) <= most_different * len(differences) and max(different, default=0) <= most_nodes, different


def transformers_drafts(model, context: list[int]) -> list[int]:
    """What a causal language model says greedily after a context: a window of draft tokens."""
    ids = torch.tensor([context])
    drafted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=WINDOW, do_sample=False)
    return drafted[0, len(context) :].tolist()
