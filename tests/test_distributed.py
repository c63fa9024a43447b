"""Two processes (gloo on the CPU) train as one with the same global batch does, and share the target's work."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_data import build_tokenizer
from test_resume import COMMON, SCRIPT, environment, step_logs

RUNS = {
    "supervised": {"objective": "supervised", "architecture": "eagle", "max_steps": 4},
    "ppow": {"objective": "ppow", "architecture": "standalone", "num_iterations": 2, "max_steps": 6},
    "block": {"objective": "supervised", "architecture": "confident", "max_steps": 4, "num_anchors": 5},
}
EVALUATION = {
    "optim": "sgd", "evaluate": True, "eval_strategy": "steps", "eval_steps": 2, "eval_prompts": 3,
    "eval_new_tokens": 6, "load_best_model_at_end": True, "metric_for_best_model": "eval_acceptance_length",
    "calibrate_at_end": False,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def train(folder: Path, processes: int) -> None:
    """Both objectives, one after the other, in `processes` processes."""
    folder.mkdir()
    runs = [
        COMMON | EVALUATION | run | {"output_dir": str(folder / name), "per_device_train_batch_size": 4 // processes}
        for name, run in RUNS.items()
    ]
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if processes > 1:
        # --multi_gpu is accelerate's word for torch's launcher; with --cpu it starts one process, unless by MPI.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    command += [str(script), json.dumps(runs)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders with the runs of one process and of two."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, processes in (("one", 1), ("two", 2)):
        train(folder / name, processes)
    return folder / "one", folder / "two"


@pytest.mark.parametrize("objective", RUNS)
def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(runs, objective):
    one, two = (folder / objective for folder in runs)
    assert (two / "state_1.json").is_file()  # there were two

    expected, found = step_logs(one), step_logs(two)
    assert [row["step"] for row in found] == list(range(1, RUNS[objective]["max_steps"] + 1))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-4), name
    for name in ("reward/mean", "accepted_length", "groups_without_spread") if objective == "ppow" else ():
        values = [[row[name] for row in rows if name in row] for rows in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-4) and values[0]

    paths = (one / "state_0.json", two / "state_0.json", two / "state_1.json")
    states = [json.loads(path.read_text()) for path in paths]
    lengths = [
        [row["eval_acceptance_length"] for row in state["log"] if "eval_acceptance_length" in row] for state in states
    ]
    assert lengths[0] == pytest.approx(lengths[1]) and lengths[0] == pytest.approx(lengths[2]) and lengths[0]
    # Every process loads the best checkpoint from where it lies in the end.
    assert [Path(state["best"]).parent for state in states] == [one, two, two]
    assert len({Path(state["best"]).name for state in states}) == 1 and Path(states[2]["best"]).is_dir()
    weights = [load_file(folder / "final/model.safetensors") for folder in (one, two)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])


WRITE = """
import json, os, sys
sys.path[:0] = [os.environ["TESTS"], os.environ["LIBRARY"]]
import torch
from test_data import LINES
from transformers import AutoModelForCausalLM, AutoTokenizer
from ppow_hf.data.regeneration import regenerate

torch.set_num_threads(1)
folder, shared = sys.argv[1], len(sys.argv) == 3
if shared:
    torch.distributed.init_process_group("gloo")
target, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
calls, generate = [], target.generate
target.generate = lambda *args, **kwargs: (calls.append(1), generate(*args, **kwargs))[1]
dataset = regenerate(
    [{"prompt": line[:length]} for line in LINES for length in (3, 9, 14, 20)], target, tokenizer,
    max_length=96, max_new_tokens=8, batch_size=2,
    temperature=[0.0, 1.0], cache_dir=os.path.join(folder, "shared" if shared else "alone"), across_processes=shared,
)
found = {"calls": len(calls), "fingerprint": dataset.fingerprint}
name = f"{torch.distributed.get_rank()}.json" if shared else "alone.json"
with open(os.path.join(folder, name), "w") as file:
    json.dump(found, file)
if shared:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_share_what_the_target_writes(make_target, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    script = tmp_path / "write.py"
    script.write_text(WRITE)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for command in ([str(script), str(tmp_path)], [*launcher, str(script), str(tmp_path), "shared"]):
        done = subprocess.run(
            [sys.executable, *command], env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert first["fingerprint"] == second["fingerprint"] == alone["fingerprint"]
    assert first["calls"] == second["calls"] == alone["calls"] / 2
    assert sorted(path.suffix for path in (tmp_path / "shared").iterdir()) == [".json", ".json"] + 2 * [".safetensors"]
