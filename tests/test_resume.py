"""A run that is killed, between saves and in the middle of one, ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ppow_hf.training.checkpoints import last_complete_checkpoint

TESTS = Path(__file__).parent
# Trains once for each of the given settings. KILL=step:N kills at the end of step N; save:N while the state of the
# optimizer of checkpoint N is being written, half a file on disk.
SCRIPT = """
import json, os, signal, sys
sys.path[:0] = [os.environ["TESTS"], os.environ["LIBRARY"]]
import torch
from conftest import build_target
from slow_training import make_drafter, random_dataset
from transformers import TrainerCallback
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.processes import end_processes

torch.set_num_threads(1)
how, _, at = os.environ.get("KILL", "never:0").partition(":")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if how == "step" and state.global_step == int(at):
            die()


def save_half(content, path, *args, save=torch.save, **kwargs):
    save(content, path, *args, **kwargs)
    if str(path).endswith(f"checkpoint-{at}/optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        die()


if how == "save":
    torch.save = save_half
target = build_target("llama", initializer_range=0.3)
for settings in json.loads(sys.argv[1]):
    architecture, resume = settings.pop("architecture"), settings.pop("resume", False)
    evaluate = random_dataset([9, 12, 8], seed=4) if settings.pop("evaluate", False) else None
    args = PPOWTrainingArguments(use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **settings)
    drafter = make_drafter(target, architecture, shares_target_embeddings=architecture == "eagle")
    trainer = PPOWTrainer(
        drafter, target, args, eval_dataset=evaluate, callbacks=[Killer()],
        train_dataset=random_dataset([13, 11, 15, 12, 9, 14, 10, 16, 8]),
    )
    trainer.train(resume_from_checkpoint=resume)
    state = {"log": trainer.state.log_history, "best": trainer.state.best_model_checkpoint}
    with open(os.path.join(args.output_dir, f"state_{args.process_index}.json"), "w") as file:
        json.dump(state, file)
    trainer.save_model(os.path.join(args.output_dir, "final"))
end_processes()
"""
COMMON = {
    "max_length": 20, "max_window": 3, "num_prefixes": 2, "num_rollouts": 4, "rollout_temperature": 0.8,
    "unroll_steps": 2, "num_anchors": 4, "cost_ratio": 0.15, "learning_rate": 1e-2, "max_steps": 8,
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
RUNS = {
    "supervised": {"objective": "supervised", "architecture": "standalone", "per_device_train_batch_size": 3},
    "ppow": {
        "objective": "ppow", "architecture": "eagle", "per_device_train_batch_size": 4, "num_iterations": 2,
    },
}  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    own = {"TESTS": str(TESTS), "LIBRARY": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    return os.environ | own | variables


def run(*runs: dict, kill: str = "never:0") -> int:
    """Exit status of a new process that trains once for each of `runs`, and may be killed on the way."""
    command = [sys.executable, "-c", SCRIPT, json.dumps([COMMON | settings for settings in runs])]
    done = subprocess.run(command, env=environment(KILL=kill), capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def step_logs(folder: Path, rank: int = 0) -> list[dict]:
    rows = json.loads((folder / f"state_{rank}.json").read_text())["log"]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A folder with an uninterrupted run of each objective."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(*(settings | {"output_dir": str(folder / name)} for name, settings in RUNS.items())) == 0
    return folder


# `last` is in the middle of the second epoch, where the order of the data is hardest to find again.
@pytest.mark.parametrize(("objective", "last"), [pytest.param("supervised", 4, marks=pytest.mark.slow), ("ppow", 6)])
def test_a_run_killed_between_and_during_saves_resumes_to_the_same_losses(tmp_path, uninterrupted, objective, last):
    whole, killed = uninterrupted / objective, tmp_path
    settings = RUNS[objective] | {"output_dir": str(killed)}
    assert run(settings, kill=f"step:{last + 1}") == -signal.SIGKILL
    assert last_complete_checkpoint(killed) == str(killed / f"checkpoint-{last}")

    assert run(settings | {"resume": True}, kill=f"save:{last + 2}") == -signal.SIGKILL
    # Half a checkpoint lies beside its place, and is not taken.
    half = f"checkpoint-{last + 2}"
    assert (killed / ".staging" / half / "optimizer.pt").is_file() and not (killed / half).exists()
    assert last_complete_checkpoint(killed) == str(killed / f"checkpoint-{last}")

    assert run(settings | {"resume": True}) == 0
    assert not (killed / ".staging").exists() and last_complete_checkpoint(killed) == str(killed / "checkpoint-8")
    expected, found = step_logs(whole), step_logs(killed)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 9))
    for name in ("loss", "grad_norm", "kl", "learning_rate"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-6), name
    for name in ("reward/mean", "accepted_length") if objective == "ppow" else ():
        values = [[row[name] for row in rows if name in row] for rows in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-6) and len(values[0]) == 4
    one, other = (load_file(folder / "final/model.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys() and all((one[name] - other[name]).abs().max() < 1e-6 for name in one)
