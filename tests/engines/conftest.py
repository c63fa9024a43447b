"""The embedded pair, held-out prompts and a real vLLM in an environment of its own (see make_environment.sh)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from engine_helpers import NEW_TOKENS, PROMPTS, WINDOW, OurRun, interpreter_or_skip, run_ours

from ppow_hf import PPOWDrafter, tiny
from ppow_hf.data.models import load_prompts, load_target, load_tokenizer
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.export import export_drafter
from ppow_hf.measure.evaluation import decode
from ppow_hf.runtime.configuration_ppow import EAGLE_NORMS
from ppow_hf.serving.vllm_runner import PYTHON_VARIABLE, run_vllm
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments


@pytest.fixture(scope="session")
def engine_python() -> str:
    """The interpreter of vLLM's environment."""
    return interpreter_or_skip("vLLM", PYTHON_VARIABLE, "make_environment.sh")


@pytest.fixture(scope="session")
def target():
    """The embedded target in float32, which goes on after an end-of-sequence token."""
    target = copy.deepcopy(load_target("tiny", dtype="float32", device="cpu"))
    target.generation_config.eos_token_id = None
    return target


@pytest.fixture(scope="session")
def prompts(target) -> list[list[int]]:
    tokenizer = load_tokenizer("tiny")
    return [ids[0].tolist() for ids in load_prompts("stdlib", PROMPTS, tokenizer, target, NEW_TOKENS)]


@pytest.fixture(scope="session")
def plain(engine_python, prompts):
    """vLLM without speculation."""
    return run_vllm(tiny.target_path(), prompts, NEW_TOKENS)


@pytest.fixture(scope="session")
def eagle() -> PPOWDrafter:
    return PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-eagle"), dtype="float32")


@pytest.fixture(scope="session")
def reduced_eagle(eagle, target, prompts) -> PPOWDrafter:
    """The embedded eagle drafter with the 1,000 tokens that its target writes most, another rotary base and norm.

    So everything that an export could lose without a word has a value of its own: d2t, rope_theta, norm.weight.
    """
    outputs, _ = decode(target, eagle, prompts[:10], NEW_TOKENS)
    counts = torch.bincount(torch.tensor(outputs).flatten(), minlength=eagle.config.vocab_size).float()
    counts[::5] += 0.5  # and every fifth of the others
    kept = counts.topk(1000).indices.sort().values
    config = copy.deepcopy(eagle.config)
    config.draft_vocab_size = len(kept)
    config.draft_config.rope_parameters = {"rope_type": "default", "rope_theta": 3000.0}
    drafter = PPOWDrafter(config)
    weights = {name: tensor.clone() for name, tensor in eagle.state_dict().items()}
    weights["draft_model.lm_head.weight"] = weights["draft_model.lm_head.weight"][kept]
    # Moved from the head's columns to the norm: the same drafter, and a poor one where the norm gets lost.
    scale = torch.logspace(-1, 1, config.draft_config.hidden_size)
    weights["draft_model.norm.weight"] *= scale
    weights["draft_model.lm_head.weight"] /= scale
    drafter.load_state_dict(weights, strict=False)
    drafter.set_draft_vocabulary(kept)
    return drafter.eval()


@pytest.fixture(scope="session")
def standalone() -> PPOWDrafter:
    return PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-standalone"), dtype="float32")


@pytest.fixture(scope="session")
def medusa(target, eagle, prompts) -> PPOWDrafter:
    """Medusa heads, trained here for half a minute on what the target writes after some of the prompts."""
    torch.manual_seed(0)
    drafter = PPOWDrafter.from_target(target, "medusa", medusa_heads=WINDOW)
    outputs, _ = decode(target, eagle, prompts[:10], NEW_TOKENS)
    shortest = min(32, *map(len, prompts[:10]))
    ids = torch.tensor([[*prompt[-shortest:], *output] for prompt, output in zip(prompts[:10], outputs, strict=False)])
    with torch.no_grad():
        states = target(ids, output_hidden_states=True).hidden_states[-1]
    heads, optimizer = drafter.draft_model, torch.optim.Adam(drafter.parameters(), lr=2e-3)
    for step in range(30):
        rows = torch.arange(step % 3, ids.shape[1] - WINDOW - 2, 3)  # every third position
        loss = 0.0
        for number, (block, head) in enumerate(zip(heads.blocks, heads.lm_heads, strict=True)):
            logits = head(block(states[:, rows]))
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, rows + 2 + number].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


@pytest.fixture(scope="session")
def eagle_with_norms(target, eagle, prompts, tmp_path_factory) -> PPOWDrafter:
    """The embedded eagle drafter with speculators' three norms, trained on with them for half a minute."""
    config = copy.deepcopy(eagle.config)
    config.state_scales = None
    for name in EAGLE_NORMS:
        setattr(config, name, True)
    drafter = PPOWDrafter(config)
    drafter.load_state_dict(eagle.state_dict(), strict=False)
    outputs, _ = decode(target, eagle, prompts, NEW_TOKENS)
    texts = [torch.tensor([*prompt[-64:], *output]) for prompt, output in zip(prompts, outputs, strict=True)]
    data = SequenceDataset(texts, [[True] * len(text) for text in texts])
    args = PPOWTrainingArguments(
        str(tmp_path_factory.mktemp("norms")), max_steps=60, objective="kl", unroll_steps=3, learning_rate=1e-3,
        per_device_train_batch_size=4, max_length=256, use_cpu=True, save_strategy="no", report_to=[],
    )  # fmt: skip
    PPOWTrainer(drafter, target, args, train_dataset=data).train()
    return drafter.eval()


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`exported(name, drafter, format)`: the directory of an export, made once."""
    made = {}

    def export(name: str, drafter: PPOWDrafter, format: str = "vllm") -> Path:
        if (name, format) not in made:
            folder = tmp_path_factory.mktemp("exports") / f"{name}-{format}"
            export_drafter(drafter, folder, format, target_name="tiny")
            if format == "speculators":  # which names the embedded target without its folder
                config = json.loads((folder / "config.json").read_text())
                config["speculators_config"]["verifier"]["name_or_path"] = str(tiny.target_path())
                (folder / "config.json").write_text(json.dumps(config))
            made[name, format] = folder
        return made[name, format]

    return export


@pytest.fixture(scope="session")
def ours(target, prompts, eagle, reduced_eagle, eagle_with_norms, standalone, medusa):
    """`ours(name)`: our run of a drafter with a fixed window, made once."""
    drafters = {"eagle": eagle, "reduced-eagle": reduced_eagle, "eagle-with-norms": eagle_with_norms,
                "standalone": standalone, "medusa": medusa}  # fmt: skip
    made = {}

    def run(name: str) -> OurRun:
        if name not in made:
            made[name] = run_ours(target, drafters[name], prompts)
        return made[name]

    run.drafters = drafters
    return run
