"""Push and pull over real HTTP, between the unmodified huggingface_hub client and the server of hub_server.py.

The clients are processes of their own, because HF_ENDPOINT and HF_HUB_DISABLE_XET are read at import; those that load
a drafter cannot import ppow_hf. Three such processes do everything; the tests look at what came of it.
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hub_server import Blob, hub_server
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ppow_hf import PPOWDrafter, PPOWDrafterConfig
from ppow_hf.publish.hub import GENERATE, repository_files, runtime_modules, write_repository
from ppow_hf.runtime.configuration_ppow import vocabulary_fingerprint
from ppow_hf.training import PPOWTrainingArguments
from ppow_hf.training.records import check_hub_strategy

TESTS = str(Path(__file__).parent)
PROMPT = [5, 9, 17, 3]

PUSH = """
import json, os, resource, sys, threading, time
from ppow_hf import PPOWDrafter
from ppow_hf.publish import hub
specs, folders = json.loads(sys.argv[1]), json.loads(sys.argv[2])
results = {}

def push(name, options):
    started = time.monotonic()
    try:
        options = dict(options)
        folder = folders[options.pop("folder", "drafter")]
        for _ in range(options.pop("pushes", 1)):
            commit = hub.push_folder(folder, name, **options)
        results[name] = {"oid": commit.oid, "pr_url": commit.pr_url}
    except Exception as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}
    results[name]["seconds"] = time.monotonic() - started

threads = [threading.Thread(target=push, args=item) for item in specs.items()]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
drafter = PPOWDrafter.from_pretrained(folders["drafter"])
results["memory"] = {"oid": drafter.push_to_hub("ada/memory", private=True, tags=["extra"]).oid}
results["metric"] = {"oid": hub.push_metric("ada/acceptance_length").oid}

sys.path.insert(0, os.environ["TESTS"])
from conftest import build_target
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
import torch
args = PPOWTrainingArguments(
    output_dir=folders["training"], objective="supervised", max_steps=2, max_length=16, max_window=3,
    per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="steps", save_steps=1, logging_steps=1,
    cost_ratio=0.1, calibrate_at_end=False, push_to_hub=True, hub_model_id="ada/trained", hub_token="hf_ada",
)
sequences = [torch.arange(1, 13) for _ in range(4)]
data = SequenceDataset(sequences, [torch.ones(12, dtype=torch.bool)] * 4)
trainer = PPOWTrainer(model=drafter, target_model=build_target("llama"), args=args, train_dataset=data)
trainer.train()
results["trained"] = {"oid": trainer.push_to_hub().oid}

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # no file may grow further: a full disk
try:
    drafter.push_to_hub("ada/full-disk")
except Exception as error:
    results["full disk up"] = {"error": type(error).__name__, "message": str(error)}
try:
    PPOWDrafter.from_pretrained("ada/plain")
except Exception as error:
    results["full disk down"] = {"error": type(error).__name__, "message": str(error)}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    again = PPOWDrafter.from_pretrained("ada/plain")
    results["after"] = {"parameters": sum(p.numel() for p in again.parameters())}
except Exception as error:
    results["after"] = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(results))
"""

# What a user's process without the package begins with.
ALONE = """
import importlib.abc, json, os, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ppow_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoPackage())
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, "ppow_hf"))]
import torch
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
target = AutoModelForCausalLM.from_pretrained(os.environ["TARGET"], dtype=torch.float32)
ids = torch.tensor([json.loads(os.environ["PROMPT"])])
plain = target.generate(ids, max_new_tokens=24, do_sample=False)
results = {"plain": plain.tolist()}

def attempt(name, function):
    try:
        results[name] = function()
    except Exception as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}

def loaded(name, **options):
    drafter = AutoModel.from_pretrained(name, trust_remote_code=True, **options)
    total = sum(float(parameter.double().sum()) for parameter in drafter.parameters())
    return {"module": type(drafter).__module__, "sum": total}

def generated(name, **options):
    return target.generate(
        ids, max_new_tokens=24, do_sample=False, custom_generate=name, trust_remote_code=True, **options
    ).tolist()
"""

PULL = """
attempt("main", lambda: loaded("ada/plain"))  # the first one: its code is that of all that follow
attempt("resumed", lambda: loaded("ada/resumed"))
attempt("cut", lambda: loaded("ada/cut"))
cache = os.path.join(os.environ["HF_HOME"], "hub", "models--ada--cut", "blobs")
results["cut blobs"] = [os.path.getsize(os.path.join(cache, name)) for name in os.listdir(cache)]
attempt("gone", lambda: loaded("ada/gone"))
attempt("tag", lambda: loaded("ada/tagged", revision="v1"))
attempt("branch", lambda: loaded("ada/branch", revision="trial"))
attempt("private", lambda: loaded("ada/private"))
attempt("stranger", lambda: loaded("ada/private2", token=False))
attempt("text", lambda: generated("ada/plain"))
attempt("tagged text", lambda: generated("ada/tagged"))
import evaluate
attempt("metric", lambda: evaluate.load("ada/acceptance_length").compute(drafted=[4, 4], accepted=[4, 1]))
script = [m for n, m in sys.modules.items() if "custom_generate" in n and vars(m).get("REPOSITORY") == "ada/plain"]
before = {name: id(d) for name, d in script[0]._drafters.items()}
attempt("again", lambda: generated("ada/plain", max_window=2))
results["kept"] = before == {name: id(d) for name, d in script[0]._drafters.items()} and len(before) == 1
trace = next(iter(script[0]._drafters.values())).last_trace
results["rounds"] = [[r.window, r.accepted] for r in trace.rounds]
results["package"] = [name for name in sys.modules if name.partition(".")[0] == "ppow_hf"]
print(json.dumps(results))
"""

OFFLINE = """
attempt("cached", lambda: loaded("ada/plain"))
attempt("cached text", lambda: generated("ada/plain"))
attempt("cut", lambda: loaded("ada/cut"))
attempt("folder", lambda: loaded(os.environ["FOLDER"]))
attempt("folder text", lambda: generated(os.environ["FOLDER"]))
for name in ("standalone", "medusa"):
    attempt(name, lambda: generated(os.environ["OTHERS"] + "/" + name))
results["package"] = [name for name in sys.modules if name.partition(".")[0] == "ppow_hf"]
print(json.dumps(results))
"""


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tokenizer_of(words: int, prefix: str = "t") -> PreTrainedTokenizerFast:
    vocabulary = {f"{prefix}{number}": number for number in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{prefix}0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_target):
    """A target, a drafter of each architecture, and beside the first everything that a training run leaves."""
    root = tmp_path_factory.mktemp("hub")
    target = make_target("llama")
    target.save_pretrained(root / "target")
    tokenizer = tokenizer_of(64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drafter = PPOWDrafter.from_target(
            target,
            "eagle",
            target_name_or_path=f"{root}/target",
            target_vocabulary_fingerprint=vocabulary_fingerprint(tokenizer),
            max_window=4,
        )
        others = {name: PPOWDrafter.from_target(target, name) for name in ("standalone", "medusa")}
    for name in ("drafter", "sharded"):
        drafter.save_pretrained(root / name, **({"max_shard_size": "20KB"} if name == "sharded" else {}))
    small = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=40_000
    )
    PPOWDrafter(PPOWDrafterConfig("standalone", small, vocab_size=40_000)).save_pretrained(root / "large")
    folder = root / "drafter"
    tokenizer.save_pretrained(folder)
    log = [{"step": 1, "loss": 2.0, "objective": "supervised"}]
    (folder / "training_log.json").write_text(json.dumps(log))
    (folder / "training.png").write_bytes(b"\x89PNG not really")
    (folder / "training_args.bin").write_bytes(b"pickled")
    (folder / "notes-to-myself.txt").write_text("private")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"pickled")
    written = {name: str(root / "others" / name) for name in others}
    for name, other in others.items():
        other.save_pretrained(root / name)
        write_repository(root / name, written[name])
    write_repository(folder, root / "written")
    return {
        name: str(root / name) for name in ("target", "drafter", "sharded", "large", "written", "others", "training")
    }


@pytest.fixture(scope="module")
def server():
    with hub_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server, folders, tmp_path_factory):
    """Runs a script in a process of its own, with the server as its Hub; returns what it printed last."""
    home = tmp_path_factory.mktemp("home")

    def run(script: str, *arguments: str, **environment: str) -> dict:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            "HF_ENDPOINT": server.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_ada",
            "TESTS": TESTS,
            "TARGET": folders["target"],
            "FOLDER": folders["written"],
            "OTHERS": folders["others"],
            "PROMPT": json.dumps(PROMPT),
            "NO_PROXY": "127.0.0.1,localhost",
            **environment,
        }
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


FAULTS = {
    "ada/no-login": {"token": "hf_wrong"},
    "ada/read-only": {"token": "hf_reader"},
    "eve/elsewhere": {},
    "ada/no-ref": {"revision": "refs/pr/9"},
    "ada/overtaken": {},
    "ada/limited": {},
    "ada/broken": {},
    "ada/commit-500": {},
    "ada/cut-upload": {},
}
STEADY = {
    "ada/plain": {},
    "ada/twice": {"pushes": 2},
    "ada/private": {"private": True},
    "ada/branch": {"revision": "trial"},
    "ada/request": {"create_pr": True},
    "ada/tagged": {"git_tag": "v1"},
    "ada/taken-tag": {"git_tag": "v1"},
    "ada/stale": {},
    "ada/sharded": {"folder": "sharded"},
    "ada/waited": {},
    "ada/recovered": {},
    "ada/unheard": {},
    "ada/resumed": {"folder": "large"},
    "ada/cut": {},
    "ada/gone": {},
}


@pytest.fixture(scope="module")
def pushed(server, client, folders):
    """All pushes at once: {repository: what push_folder returned or raised}."""
    for name in ("ada/read-only", "ada/taken-tag", "ada/stale", "ada/no-ref"):
        server.create("model", name)
    server.create("model", "ada/private2", private=True)
    server.model("ada/taken-tag").refs["refs/tags/v1"] = server.model("ada/taken-tag").commits[0]
    stale = server.model("ada/stale")
    old = (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "training_args.bin",
    )
    files = {**stale.commits[0].files, **{name: Blob(b"old", True) for name in old}, "notes.md": Blob(b"kept", False)}
    server.commit(stale, "refs/heads/main", "older", "", files)
    server.fail("ada/overtaken", "commit", race=True)
    server.fail("ada/limited", "preupload", status=429, headers={"Retry-After": "0"})
    server.fail("ada/broken", "batch", status=503, headers={"Retry-After": "0"})
    server.fail("ada/commit-500", "commit", status=500)
    server.fail("ada/cut-upload", "upload", cut_after=1000, times=1)
    server.fail("ada/cut-upload", "upload", status=403)
    server.fail("ada/waited", "commit", status=429, headers={"Retry-After": "1"}, times=1)
    server.fail("ada/recovered", "upload", cut_after=1000, times=1)
    server.fail("ada/unheard", "commit", silent=True)
    server.fail("ada/trained", "commit", status=500, times=1)
    before = digest(Path(folders["drafter"]))
    results = client(PUSH, json.dumps({**FAULTS, **STEADY}), json.dumps(folders))
    results["unchanged"] = before == digest(Path(folders["drafter"]))
    return results


@pytest.fixture(scope="module")
def pulled(server, client, pushed):
    """What a process without ppow_hf got over HTTP, some downloads being cut."""
    server.fail("ada/resumed", "cdn", cut_after=12_000_000, times=1)  # the client keeps pieces of 10 MiB
    server.fail("ada/cut", "cdn", cut_after=30_000, times=1)
    server.fail("ada/cut", "cdn", status=404)
    server.fail("ada/gone", "resolve", status=404, headers={"X-Error-Code": "RepoNotFound"})
    return client(ALONE + PULL)


@pytest.fixture(scope="module")
def offline(server, client, pulled):
    """What such a process gets afterwards without a network."""
    asked = len(server.requests)
    results = client(ALONE + OFFLINE, HF_HUB_OFFLINE="1")
    assert len(server.requests) == asked
    return results


# -- what is pushed


def test_a_push_is_one_commit_that_holds_everything(pushed, server):
    commits = server.model("ada/plain").commits
    assert [commit.title for commit in commits] == ["Upload drafter", "initial commit"]
    assert commits[0].oid == pushed["ada/plain"]["oid"]
    names = set(commits[0].files)
    assert {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md", "training.png",
        "training_log.json", "modeling_ppow.py", "configuration_ppow.py", "draft_session.py", "generation.py",
        "trace.py", "acceptance.py", "windowing.py", "compatibility.py", GENERATE,
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".txt")) or "checkpoint" in name]
    assert commits[0].files["model.safetensors"].lfs
    script = commits[0].files[GENERATE].data.decode()
    assert 'REPOSITORY = "ada/plain"' in script and "REVISION: str | None = None" in script


def test_no_path_of_the_machine_is_pushed(pushed, server, folders):
    root = str(Path(folders["target"]).parent).encode()
    for name in ("ada/plain", "ada/trained"):
        for path, blob in server.model(name).commits[0].files.items():
            assert root not in blob.data, path
    config = json.loads(server.model("ada/plain").commits[0].files["config.json"].data)
    assert config["target_name_or_path"] == "target" and config["auto_map"]["AutoModel"] == "modeling_ppow.PPOWDrafter"


def test_the_code_that_travels_imports_nothing_that_does_not():
    from transformers.dynamic_module_utils import get_imports

    wanted = {name for module in runtime_modules() for name in get_imports(module)}
    assert wanted - set(sys.stdlib_module_names) <= {"torch", "transformers", "numpy"}


def test_private_branch_pull_request_and_tag(pushed, server):
    assert server.model("ada/private").private and not server.model("ada/plain").private
    branch = server.model("ada/branch")
    assert branch.refs["refs/heads/trial"].oid == pushed["ada/branch"]["oid"] and len(branch.commits) == 1
    request = server.model("ada/request")
    assert request.refs["refs/pr/1"].title == "Upload drafter" and len(request.commits) == 1
    assert pushed["ada/request"]["pr_url"].endswith("/ada/request/discussions/1")
    tagged = server.model("ada/tagged")
    assert tagged.refs["refs/tags/v1"].oid == pushed["ada/tagged"]["oid"]
    assert 'REVISION: str | None = "v1"' in tagged.commits[0].files[GENERATE].data.decode()


def test_a_taken_tag_is_refused_before_anything_is_sent(pushed, server):
    assert "git_tag: ada/taken-tag has a tag 'v1' already" in pushed["ada/taken-tag"]["message"]
    assert len(server.model("ada/taken-tag").commits) == 1


def test_pushing_the_same_again_makes_no_second_commit(pushed, server):
    assert len(server.model("ada/twice").commits) == 2


def test_weights_of_an_older_push_go_in_the_same_commit(pushed, server):
    commits = server.model("ada/stale").commits
    assert len(commits) == 3 and "notes.md" in commits[0].files
    assert [name for name in commits[0].files if name.endswith((".safetensors", ".bin"))] == ["model.safetensors"]
    assert "model.safetensors.index.json" not in commits[0].files


def test_shards_are_pushed_with_their_index(pushed, server):
    files = server.model("ada/sharded").commits[0].files
    index = json.loads(files["model.safetensors.index.json"].data)
    assert len(set(index["weight_map"].values())) > 1 and set(index["weight_map"].values()) <= set(files)


def test_a_drafter_in_memory_is_pushed(pushed, server):
    repository = server.model("ada/memory")
    assert repository.private and len(repository.commits) == 2
    assert "- extra" in repository.commits[0].files["README.md"].data.decode()


def test_a_trainer_pushes_its_records_and_nothing_pickled(pushed, server):
    files = server.model("ada/trained").commits[0].files
    assert not [name for name in files if name.endswith(".bin")]
    arguments = json.loads(files["training_arguments.json"].data)
    assert arguments["objective"] == "supervised" and arguments["max_steps"] == 2 and "hub_token" not in arguments
    provenance = json.loads(files["provenance.json"].data)
    assert provenance["versions"]["torch"] == torch.__version__ and provenance["seeds"]["seed"] == 42
    assert len(provenance["data_fingerprint"]) == 16
    log = json.loads(files["training_log.json"].data)
    assert any("loss" in row for row in log) and {row["objective"] for row in log} == {"supervised"}
    assert b"hf_ada" not in b"".join(blob.data for blob in files.values())


def test_a_push_during_training_that_fails_does_not_end_it(pushed, server):
    commits = server.model("ada/trained").commits
    assert [commit.title for commit in commits] == [
        "End of training",
        "Training in progress, step 2",
        "initial commit",
    ]
    assert pushed["trained"]["oid"] == commits[0].oid


def test_checkpoints_whose_optimizer_is_a_pickle_are_not_pushed(tmp_path):
    args = PPOWTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy="checkpoint", report_to=[])
    with pytest.raises(ValueError, match="hub_strategy: 'checkpoint' uploads checkpoints"):
        check_hub_strategy(args)


# -- what goes wrong while pushing


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ada/no-login", "log in with `hf auth login`"),
        ("ada/read-only", "use one with write permission, or create_pr=True"),
        ("eve/elsewhere", "use one with write permission"),
        ("ada/no-ref", "revision is wrong"),
        ("ada/overtaken", "Somebody else changed ada/overtaken meanwhile"),
        ("ada/limited", "The Hub allows no more requests for now"),
        ("ada/broken", "The Hub had a fault: push again later"),
        ("ada/commit-500", "The Hub had a fault: push again later"),
        ("ada/cut-upload", "use one with write permission"),
    ],
)
def test_a_failed_push_adds_no_commit_and_says_what_to_do(pushed, server, name, words):
    assert pushed[name]["error"] == "PushError"
    message = pushed[name]["message"]
    assert words in message and "Nothing was committed" in message and "hf_" not in message
    repository = server.repositories.get(("model", name))
    if repository is not None:
        assert "Upload drafter" not in [commit.title for commit in repository.commits]


def test_the_local_files_are_as_they_were(pushed):
    assert pushed["unchanged"]


def test_a_cut_upload_is_sent_again(pushed, server):
    assert server.model("ada/recovered").commits[0].oid == pushed["ada/recovered"]["oid"]
    tries = [path for method, path, _ in server.requests if method == "PUT" and "/ada/recovered/" in path]
    assert len(tries) == len(set(tries)) + 1


def test_a_commit_waits_as_long_as_the_hub_says(pushed, server):
    assert pushed["ada/waited"]["seconds"] >= 1 and len(server.model("ada/waited").commits) == 2


def test_a_commit_whose_answer_got_lost_is_found(pushed, server):
    assert pushed["ada/unheard"]["oid"] == server.model("ada/unheard").commits[0].oid
    assert len(server.model("ada/unheard").commits) == 2


def test_a_full_disk_while_saving_sends_nothing(pushed, server):
    assert pushed["full disk up"]["error"] == "PushError" and "TMPDIR" in pushed["full disk up"]["message"]
    assert ("model", "ada/full-disk") not in server.repositories


# -- what is pulled


def weight_sum(folder: str) -> float:
    drafter = PPOWDrafter.from_pretrained(folder)
    return sum(float(parameter.detach().double().sum()) for parameter in drafter.parameters())


def test_by_name_tag_branch_and_folder_without_the_package(pulled, offline, folders):
    expected = weight_sum(folders["drafter"])
    for found in (pulled["main"], pulled["tag"], pulled["branch"], pulled["private"], offline["folder"]):
        assert found["sum"] == expected and found["module"].startswith("transformers_modules.")
    assert pulled["package"] == offline["package"] == []


def test_custom_generate_runs_our_loop_and_changes_no_token(pulled, offline):
    for text in (pulled["text"], pulled["tagged text"], pulled["again"], offline["folder text"]):
        assert text == pulled["plain"]
    assert offline["standalone"] == offline["medusa"] == offline["plain"]
    windows = [window for window, _ in pulled["rounds"]]
    assert max(windows) <= 2 and sum(accepted + 1 for _, accepted in pulled["rounds"]) == 24
    assert pulled["kept"]  # the drafter was loaded once


def test_from_the_cache_without_a_network(offline, folders):
    assert offline["cached"]["sum"] == weight_sum(folders["drafter"]) and offline["cached text"] == offline["plain"]


def test_a_cut_download_goes_on_where_it_was_cut(pulled, server, folders):
    assert pulled["resumed"]["sum"] == weight_sum(folders["large"])
    ranges = [h["range"] for _, path, h in server.requests if "/lfs/cdn/ada/resumed" in path and "range" in h]
    assert len(ranges) == 1 and int(ranges[0].removeprefix("bytes=").removesuffix("-")) > 10_000_000


def test_a_cut_download_is_never_loaded(pulled, offline, server):
    whole = len(server.model("ada/cut").commits[0].files["model.safetensors"].data)
    assert "error" in pulled["cut"] and whole not in pulled["cut blobs"] and 30_000 not in pulled["cut blobs"]
    assert "error" in offline["cut"]


def test_a_full_disk_while_loading_is_an_error_and_the_next_time_it_loads(pushed):
    assert "error" in pushed["full disk down"] and pushed["after"]["parameters"] > 1000


def test_what_may_not_be_seen_is_not_found(pulled):
    assert "error" in pulled["gone"] and "error" in pulled["stranger"]


def test_a_metric_is_loaded_from_the_hub(pulled, pushed):
    assert pulled["metric"]["acceptance_length"] == 3.5


# -- the folder


def test_a_damaged_folder_is_refused_before_anything_is_sent(folders, tmp_path):
    source = Path(folders["drafter"])
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors in .* is damaged"):
        repository_files(tmp_path, "ada/x")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model.safetensors. Only safetensors are pushed"):
        repository_files(tmp_path, "ada/x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="type 'llama', not a PPOWDrafter"):
        repository_files(tmp_path, "ada/x")


def test_a_target_it_was_not_trained_for_is_warned_of(make_target, folders):
    target = make_target("llama")
    drafter = PPOWDrafter.from_target(target, "standalone", target_name_or_path="ada/base")
    drafter.config.target_vocabulary_fingerprint = vocabulary_fingerprint(tokenizer_of(64))
    ids = torch.tensor([PROMPT])
    settings = {"max_new_tokens": 2, "do_sample": False}

    def warned(name: str, tokenizer=None) -> list[str]:
        target.config._name_or_path = name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            target.generate(ids, custom_generate=drafter.generate_with(tokenizer=tokenizer), **settings)
            target.generate(ids, assistant_model=drafter, tokenizer=tokenizer, **settings)
        return [str(w.message) for w in caught if "trained for" in str(w.message)]

    try:
        assert warned("ada/base") == warned("/models/base") == warned("") == []
        assert warned("/cache/models--ada--base/snapshots/0123abc") == []
        assert warned("ada/base", tokenizer_of(64)) == []
        assert len(warned("ada/base-instruct")) == 2 and "'ada/base'" in warned("ada/base-instruct")[0]
        other = warned("ada/base", tokenizer_of(64, prefix="u"))
        assert len(other) == 2 and "vocabulary" in other[0]
    finally:
        target.config._name_or_path = ""
