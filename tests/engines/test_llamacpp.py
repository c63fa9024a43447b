"""GGUF files in a real llama.cpp on a CPU: the same text as without the drafter, and as many accepted tokens as ours.

llama.cpp says how many tokens it drafted and accepted, not at which positions; it drafts no further than there is
room, as we do. Float32 throughout but where a test says otherwise.
"""

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
from engine_helpers import NEW_TOKENS, WINDOW, interpreter_or_skip, random_prompts, trained_eagle
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ppow_hf.data.models import load_tokenizer
from ppow_hf.export import export_drafter, write_causal_lm
from ppow_hf.export.gguf_files import write_eagle3
from ppow_hf.export.gguf_tokenizer import SPLIT_NAMES
from ppow_hf.measure.evaluation import decode
from ppow_hf.serving.llamacpp_runner import PYTHON_VARIABLE, run_llamacpp

pytestmark = pytest.mark.engines

KINDS = {"eagle": "eagle3", "reduced-eagle": "eagle3", "standalone": "draft_model"}
TEXTS = [
    "def add(a, b):\n    return a+b  # 12345 x1",
    "It's  naïve — 'We'll' pay €3.50!\r\n\t\tOK",
    "日本語 и ещё 𝛼β\n\n\n end  ",
]


@pytest.fixture(scope="module")
def llamacpp_python():
    return interpreter_or_skip("llama.cpp", PYTHON_VARIABLE, "make_llamacpp_environment.sh")


@pytest.fixture(scope="module")
def target_file(llamacpp_python, target, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "target.gguf"
    write_causal_lm(path, target, load_tokenizer("tiny"), "float32")
    return path


@pytest.fixture(scope="module")
def plain(target_file, prompts):
    """llama.cpp without speculation."""
    return run_llamacpp(target_file, prompts, NEW_TOKENS)


@pytest.fixture(scope="module")
def drafters(eagle, reduced_eagle, standalone):
    return {"eagle": eagle, "reduced-eagle": reduced_eagle, "standalone": standalone}


@pytest.fixture(scope="module")
def ours(target, prompts, drafters):
    """`ours(name)`: rounds, drafted and accepted tokens of our own decoding with a fixed window."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = count_ours(target, drafters[name], prompts)
        return made[name]

    return run


def count_ours(target, drafter, prompts, new_tokens=NEW_TOKENS):
    """Rounds, drafted and accepted tokens; the first of ours is the prompt's forward, which drafts nothing."""
    _, traces = decode(target, drafter, prompts, new_tokens, window="fixed", max_window=WINDOW)
    rounds = [r for trace in traces for r in trace.rounds[1:]]
    return len(rounds), sum(r.window for r in rounds), sum(r.accepted for r in rounds)


def export_file(drafter, folder, target, dtype="float32", **options):
    tokenizer = load_tokenizer("tiny")
    export_drafter(drafter, folder, "gguf", target=target, tokenizer=tokenizer, gguf_dtype=dtype, **options)
    return next(folder.glob("*.gguf"))


def assert_same_counts(run, ours):
    counts = f"rounds, drafted, accepted: llama.cpp {run.drafts} {run.drafted} {run.accepted}, ours {ours}"
    print(f"acceptance length {run.acceptance_length:.3f}; {counts}")
    assert ours[2] >= len(run.outputs), counts
    # Exactly: with layers shifted by one, nearly as many tokens are accepted.
    assert (run.drafts, run.drafted, run.accepted) == ours, counts


def test_llamacpp_without_speculation_says_what_transformers_says(plain, target, prompts):
    for output, prompt in zip(plain.outputs, prompts, strict=True):
        ids = torch.tensor([prompt])
        generated = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert output == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", KINDS)
def test_export_drafts_as_ours(name, target, target_file, drafters, ours, plain, prompts, tmp_path):
    file = export_file(drafters[name], tmp_path, target)
    run = run_llamacpp(target_file, prompts, NEW_TOKENS, KINDS[name], file, WINDOW)
    assert run.outputs == plain.outputs
    assert_same_counts(run, ours(name))


def test_embeddings_left_out_are_the_targets(eagle, target, target_file, ours, plain, prompts, tmp_path):
    file = tmp_path / "drafter.gguf"
    shared = copy.deepcopy(eagle)
    shared.get_input_embeddings().weight.data.copy_(target.get_input_embeddings().weight)
    write_eagle3(file, shared, load_tokenizer("tiny"), "float32", embeddings=False)
    run = run_llamacpp(target_file, prompts, NEW_TOKENS, "eagle3", file, WINDOW)
    assert run.outputs == plain.outputs
    assert_same_counts(run, count_ours(target, shared, prompts))


@pytest.mark.parametrize("name", ["eagle", "standalone"])
def test_the_python_of_the_readme_says_what_transformers_says(name, drafters, target, llamacpp_python, tmp_path):
    tokenizer, folder = load_tokenizer("tiny"), tmp_path / "exported"
    export_file(drafters[name], folder, target)
    write_causal_lm(tmp_path / "TARGET.gguf", target, tokenizer, "float32")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    finished = subprocess.run([llamacpp_python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    inputs = tokenizer("def add(a, b):", return_tensors="pt")
    output = target.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) in finished.stdout


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_smaller_files_draft_nearly_as_well(dtype, standalone, target, target_file, ours, plain, prompts, tmp_path):
    file = export_file(standalone, tmp_path, target, dtype)
    run = run_llamacpp(target_file, prompts, NEW_TOKENS, "draft_model", file, WINDOW)
    print(f"{dtype}: acceptance length {run.acceptance_length:.3f}, {file.stat().st_size} bytes")
    assert run.outputs == plain.outputs
    assert run.accepted == pytest.approx(ours("standalone")[2], rel=0.05)


def test_counts_betray_shifted_layers(eagle, target, target_file, ours, plain, prompts, tmp_path):
    shifted = copy.deepcopy(eagle)
    shifted.config.target_layer_ids = [layer + 1 for layer in eagle.config.target_layer_ids]
    file = export_file(shifted, tmp_path, target)
    run = run_llamacpp(target_file, prompts, NEW_TOKENS, "eagle3", file, WINDOW)
    assert run.outputs == plain.outputs
    with pytest.raises(AssertionError, match="rounds, drafted, accepted"):
        assert_same_counts(run, ours("eagle"))


# -- other families and tokenizers


def bpe_tokenizer(pre_tokenizer, vocab_size=300):
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def random_model(family, layers=2, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    return AutoModelForCausalLM.from_config(config).float().eval()


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}, "attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_other_models_say_what_transformers_says(llamacpp_python, family, fields, tmp_path):
    """And draft for themselves without a rejected token."""
    model, tokenizer = random_model(family, **fields), bpe_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    write_causal_lm(tmp_path / "model.gguf", model, tokenizer, "float32")
    ids = torch.randint(1, 280, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[:, 12:]
    file = tmp_path / "model.gguf"
    run = run_llamacpp(file, ids.tolist(), 24, "draft_model", file, WINDOW)
    assert run.outputs == expected.tolist()
    assert run.accepted == run.drafted > 0


def test_eagle_drafter_of_a_qwen3_target(llamacpp_python, tmp_path):
    target, chats = random_model("qwen3", layers=4, head_dim=32).requires_grad_(False), random_prompts()
    target.generation_config.eos_token_id = None
    drafter = trained_eagle(target, chats)
    tokenizer = bpe_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_causal_lm(tmp_path / "target.gguf", target, tokenizer, "float32")
    export_drafter(drafter, tmp_path, "gguf", target=target, tokenizer=tokenizer, gguf_dtype="float32")
    # Short texts: random weights make near ties, which llama.cpp may round the other way in a window.
    plain = run_llamacpp(tmp_path / "target.gguf", chats, 24)
    file = tmp_path / "drafter-f32.gguf"
    run = run_llamacpp(tmp_path / "target.gguf", chats, 24, "eagle3", file, WINDOW)
    assert run.outputs == plain.outputs
    assert_same_counts(run, count_ours(target, drafter, chats, 24))


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        *(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            for pattern in SPLIT_NAMES
        ),
    ],
    ids=["gpt-2", "smollm", *SPLIT_NAMES.values()],
)
def test_llamacpp_tokenizes_as_transformers(llamacpp_python, pre_tokenizer, tmp_path):
    tokenizer = bpe_tokenizer(pre_tokenizer, 320)
    texts = [*TEXTS, f"{TEXTS[0]}<|end|>{TEXTS[1]}"]
    write_causal_lm(tmp_path / "model.gguf", random_model("llama"), tokenizer, "float32")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    job = Path(__file__).with_name("llamacpp_tokenize_job.py")
    command = [llamacpp_python, job, tmp_path / "model.gguf", tmp_path / "texts.json", tmp_path / "ids.json"]
    finished = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads((tmp_path / "ids.json").read_text()) == tokenizer(texts).input_ids
