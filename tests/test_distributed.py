"""Several processes (gloo on the CPU) train as one with the same global batch does, and share the target's work."""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_data import LINES, build_tokenizer
from test_resume import COMMON, SCRIPT, environment, step_logs

RUNS = {
    "supervised": {"objective": "supervised", "architecture": "eagle", "max_steps": 4, "num_anchors": None},
    "tv": {"objective": "tv", "architecture": "eagle", "max_steps": 4, "num_anchors": None},  # on visited windows
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


def train(folder: Path, processes: int, machines: int) -> None:
    """All objectives, one after the other, in `processes` processes."""
    folder.mkdir()
    runs = [
        COMMON | EVALUATION | run | {"output_dir": str(folder / name), "per_device_train_batch_size": 4 // processes}
        for name, run in RUNS.items()
    ]
    done = launch(folder, SCRIPT, processes, json.dumps(runs), machines=machines)
    assert done.returncode == 0, done.stderr[-4000:]


def launch(
    folder: Path, code: str, processes: int, *words: str, machines: int = 1, **variables: str
) -> subprocess.CompletedProcess:
    """A script in `processes` processes, which as many launchers as `machines` start; the first one's outcome."""
    script = folder / "train.py"
    script.write_text(code)
    command = [sys.executable]
    if processes > 1:
        # --multi_gpu is accelerate's word for torch's launcher; with --cpu it starts one process, unless by MPI.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", str(machines), "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    others = [
        subprocess.Popen([*command, "--machine_rank", str(rank), str(script), *words], env=environment(**variables))
        for rank in range(1, machines)
    ]
    if machines > 1:
        command += ["--machine_rank", "0"]
    done = subprocess.run(
        [*command, str(script), *words], env=environment(**variables), capture_output=True, text=True, timeout=600
    )
    for other in others:
        assert other.wait(timeout=60) == done.returncode
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(processes, machines)`: the folder with all objectives' runs, trained once."""
    folder = tmp_path_factory.mktemp("distributed")

    @functools.cache
    def folder_of(processes: int, machines: int = 1) -> Path:
        path = folder / f"{processes}-{machines}"
        train(path, processes, machines)
        return path

    return folder_of


@pytest.mark.parametrize("objective", RUNS)
@pytest.mark.parametrize(
    ("processes", "machines"),
    [
        pytest.param(2, 1, id="two"),
        pytest.param(4, 1, id="four", marks=pytest.mark.slow),
        pytest.param(2, 2, id="two-machines", marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_losses_of_one_with_the_same_global_batch(trained, processes, machines, objective):
    one, several = (trained(*of) / objective for of in ((1,), (processes, machines)))
    expected, found = step_logs(one), step_logs(several)
    assert [row["step"] for row in found] == list(range(1, RUNS[objective]["max_steps"] + 1))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-4), name
    for name in ("reward/mean", "accepted_length", "groups_without_spread") if objective == "ppow" else ():
        values = [[row[name] for row in rows if name in row] for rows in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-4) and values[0]

    paths = (one / "state_0.json", *(several / f"state_{rank}.json" for rank in range(processes)))
    states = [json.loads(path.read_text()) for path in paths]
    lengths = [
        [row["eval_acceptance_length"] for row in state["log"] if "eval_acceptance_length" in row] for state in states
    ]
    assert lengths[0] and all(other == pytest.approx(lengths[0]) for other in lengths[1:])
    # Every process loads the best checkpoint from where it lies in the end.
    assert [Path(state["best"]).parent for state in states] == [one] + [several] * processes
    assert len({Path(state["best"]).name for state in states}) == 1 and Path(states[1]["best"]).is_dir()
    weights = [load_file(folder / "final/model.safetensors") for folder in (one, several)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])


def test_a_rank_that_fails_ends_all_with_its_message(tmp_path):
    """Its weights are no numbers from the second step on, while the other waits for its gradients."""
    spoil = """
class Spoiler(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if args.process_index == 1 and state.global_step == 1:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
"""
    code = SCRIPT.replace("def save_half", spoil + "\n\ndef save_half").replace("[Killer()]", "[Killer(), Spoiler()]")
    run = COMMON | RUNS["supervised"] | {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2}
    done = launch(tmp_path, code, 2, json.dumps([run]))
    assert done.returncode != 0
    assert "the loss is nan at step 1, so the drafter's logits are no longer finite" in done.stderr


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(trained, tmp_path):
    settings = COMMON | EVALUATION | RUNS["tv"] | {"output_dir": str(tmp_path / "tv"), "save_steps": 2}
    two = json.dumps([settings | {"per_device_train_batch_size": 2}])
    assert launch(tmp_path, SCRIPT, 2, two, KILL="step:3").returncode != 0
    one = json.dumps([settings | {"per_device_train_batch_size": 4, "resume": True}])
    done = launch(tmp_path, SCRIPT, 1, one)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = (step_logs(folder / "tv") for folder in (trained(1), tmp_path))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-4)


SHARDED = """
import json, os, sys
sys.path[:0] = [os.environ["TESTS"], os.environ["LIBRARY"]]
import torch
from conftest import build_target
from slow_training import batch_of, make_drafter, random_dataset
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.processes import end_processes

torch.set_num_threads(1)
folder, run = sys.argv[1], json.loads(sys.argv[2])
target, data = build_target("llama", initializer_range=0.3), random_dataset([13, 11, 15, 12])
drafter = make_drafter(target, run.pop("architecture"))
args = PPOWTrainingArguments(folder, use_cpu=True, report_to=[], muon=0, **run)
trainer = PPOWTrainer(drafter, target, args, train_dataset=data)
if args.world_size > 1:
    from torch.distributed.fsdp import fully_shard
    fully_shard(drafter, mesh=torch.distributed.init_device_mesh("cpu", (args.world_size,)))
    assert type(next(drafter.parameters())).__name__ == "DTensor"
inputs = batch_of(data, range(args.process_index, 4, args.world_size))
items, optimizer, losses = sum(len(data[row]["input_ids"]) - 1 for row in range(4)), None, []
trainer._train_began, trainer.state.max_steps = 0.0, 3
for step in range(3):
    trainer.state.global_step = step
    optimizer = optimizer or torch.optim.SGD(drafter.parameters(), lr=0.1)
    loss = trainer.compute_loss(drafter, inputs, num_items_in_batch=items)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(trainer.accelerator.gather(loss.detach()[None]).mean().item())
trainer.is_fsdp_enabled = args.world_size > 1  # as where accelerate shards it
losses.append(trainer.evaluate(random_dataset([9, 12, 8], seed=4))["eval_acceptance_length"])
if args.process_index == 0:
    with open(os.path.join(folder, f"losses_{args.world_size}.json"), "w") as file:
        json.dump(losses, file)
end_processes()
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "objective", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("supervised", "tv")), "ppow"]
)
def test_a_drafter_sharded_by_fsdp2_has_the_losses_of_a_whole_one(tmp_path, objective, processes):
    run = COMMON | RUNS[objective] | {"num_iterations": 1, "architecture": "eagle", "eval_new_tokens": 6}
    for count in (1, processes):
        words = str(tmp_path), json.dumps(run | {"per_device_train_batch_size": 4 // count})
        done = launch(tmp_path, SHARDED, count, *words)
        assert done.returncode == 0, done.stderr[-4000:]
    expected, found = (json.loads((tmp_path / f"losses_{count}.json").read_text()) for count in (1, processes))
    assert found == pytest.approx(expected, abs=1e-5) and len(set(found[:3])) == 3


def test_a_tensor_parallel_target_trains_evaluates_and_records_as_a_whole_one(make_target, tmp_path):
    """All processes read the batches of all with their parts of it, and decode the same held-out prompts."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "target")
    make_target("llama", initializer_range=0.3).save_pretrained(tmp_path / "target")
    target = 'AutoModelForCausalLM.from_pretrained(os.environ["TARGET"], **json.loads(os.environ["PLACED"])).eval()'
    code = SCRIPT.replace('build_target("llama", initializer_range=0.3)', target)
    code = code.replace("import TrainerCallback", "import AutoModelForCausalLM, TrainerCallback")
    for processes, placed in ((1, {}), (2, {"tp_plan": "auto"})):
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = EVALUATION | {"calibrate_at_end": True, "per_device_train_batch_size": 4 // processes}
        runs = [
            COMMON | settings | run | {"output_dir": str(folder / name), "proximity_weight": 0.5}
            for name, run in RUNS.items() if name != "block"
        ]  # fmt: skip
        variables = {"TARGET": str(tmp_path / "target"), "PLACED": json.dumps(placed)}
        done = launch(folder, code, processes, json.dumps(runs), **variables)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in ("supervised", "tv", "ppow"):
        expected, found = (json.loads((tmp_path / f"{n}/{name}/state_0.json").read_text())["log"] for n in "12")
        for metric in ("loss", "grad_norm", "accepted_length", "eval_acceptance_length"):
            values = [[row[metric] for row in rows if metric in row] for rows in (found, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-4), (name, metric)
        configs = [json.loads((tmp_path / f"{n}/{name}/final/config.json").read_text()) for n in "12"]
        greedy = [config["calibration"]["greedy"]["observations"] for config in configs]
        assert greedy[0] == greedy[1] > 0


@pytest.mark.slow
def test_a_tensor_parallel_target_is_recorded_as_a_whole_one(make_target, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "target")
    make_target("llama", initializer_range=0.3, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "target")
    rows = [{"text": line} for line in LINES]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "ppow_hf.cli", "record", "--target", "target", "--data", "texts.jsonl", "--max-length", "32"]
    command += ["--states-dtype", "float32", "--dtype", "float32"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for words in (
        [*command, "--output-dir", "whole"],
        [*launcher, *command, "--output-dir", "split", "--tp-plan", "auto"],
    ):
        done = subprocess.run(
            [sys.executable, *words], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
    manifests = [(tmp_path / name / "record.json").read_text() for name in ("whole", "split")]
    assert manifests[0] == manifests[1]  # either could go on with the other
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        expected, found = load_file(path), load_file(tmp_path / "split" / path.name)
        assert expected.keys() == found.keys()
        assert all((found[name].float() - expected[name].float()).abs().max() < 1e-4 for name in expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_losses_of_one_process(trained, tmp_path, stage):
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed, and DS_ACCELERATOR=cpu")
    zero = {
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        },
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    }  # fmt: skip
    settings = COMMON | EVALUATION | {"per_device_train_batch_size": 2, "deepspeed": zero, "calibrate_at_end": True}
    runs = [settings | run | {"output_dir": str(tmp_path / name)} for name, run in RUNS.items()]
    done = launch(tmp_path, SCRIPT, 2, json.dumps(runs), DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-4000:]
    for name in RUNS:
        expected, found = (
            json.loads((folder / name / "state_0.json").read_text())["log"] for folder in (trained(1), tmp_path)
        )
        for metric in ("loss", "grad_norm", "eval_acceptance_length"):
            values = [[row[metric] for row in rows if metric in row] for rows in (found, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-4) and values[0], (name, metric)
        weights = [load_file(folder / name / "final/model.safetensors") for folder in (trained(1), tmp_path)]
        assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-4 for key in weights[0])


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


def write(cache_dir):
    prompts = [{"prompt": line[:length]} for line in LINES for length in (3, 9, 14, 20)]
    return regenerate(
        prompts, target, tokenizer, max_length=96, max_new_tokens=8, batch_size=2, temperature=[0.0, 1.0],
        cache_dir=cache_dir, across_processes=shared,
    )


dataset = write(os.path.join(folder, "shared" if shared else "alone"))
found = {"calls": len(calls), "fingerprint": dataset.fingerprint}
if shared:  # of two processes without a folder in common one has the texts already
    rank = torch.distributed.get_rank()
    found["half"] = write(os.path.join(folder, "alone" if rank == 0 else "empty")).fingerprint
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
    assert first["fingerprint"] == second["fingerprint"] == alone["fingerprint"] == first["half"] == second["half"]
    assert first["calls"] == second["calls"] == alone["calls"] / 2
    assert sorted(path.suffix for path in (tmp_path / "shared").iterdir()) == [".json", ".json"] + 2 * [".safetensors"]
