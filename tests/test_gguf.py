"""GGUF files: read back by transformers' own reader and by closed forms, and refused where llama.cpp would differ.

What llama.cpp does with them is tested in tests/engines.
"""

import copy
import math
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ppow_hf import PPOWDrafter, cli
from ppow_hf.export import export_drafter
from ppow_hf.export.gguf_files import interleaved_rotary, rotary_factors, write_causal_lm, write_eagle3
from ppow_hf.export.gguf_tokenizer import CONTROL, NORMAL, SPLIT_NAMES, UNUSED, USER_DEFINED, gguf_vocabulary

VOCABULARY = 320
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def make_tokenizer(pre_tokenizer=BYTE_LEVEL, **special):
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(["def mean(values):\n    return sum(values) / len(values)\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>", **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def target(make_target):
    return make_target("llama", vocab_size=VOCABULARY, initializer_range=0.2)


def read(path):
    """The fields and the tensors of a GGUF file, matrices as float32."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: tensor.data
        if tensor.tensor_type == gguf.GGMLQuantizationType.I64
        else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


# -- causal language models


def qwen(family):
    torch.manual_seed(0)
    fields = {"qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 128}}[family]
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **fields,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_file_back(tmp_path, target, tokenizer, family):
    model = target if family == "llama" else qwen(family)
    tensors = write_causal_lm(tmp_path / "model.gguf", model, tokenizer, "float32")
    assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(24)[None] * 7 % VOCABULARY
    torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_q8_0_is_within_half_a_step_of_each_block(tmp_path, target, tokenizer):
    written = write_causal_lm(tmp_path / "model.gguf", target, tokenizer, "q8_0")
    fields, found = read(tmp_path / "model.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    for name, tensor in written.items():
        blocks = tensor.detach().reshape(-1, 32)
        steps = blocks.abs().amax(-1, keepdim=True) / 127
        # Half a step, and the step itself is rounded to float16.
        difference = (torch.tensor(found[name]).reshape(-1, 32) - blocks).abs()
        assert bool((difference <= (0.6 if tensor.ndim > 1 else 0.0) * steps + 1e-9).all())


def test_queries_are_reordered_for_adjacent_pairs():
    """Turning number i with i + d/2 before is turning 2i with 2i + 1 after."""
    heads, size = 3, 8
    ours = torch.arange(heads * size)[:, None]
    theirs = interleaved_rotary(ours, heads).reshape(heads, size)
    for head in range(heads):
        for pair in range(size // 2):
            first, second = theirs[head, 2 * pair].item(), theirs[head, 2 * pair + 1].item()
            assert (first, second) == (head * size + pair, head * size + pair + size // 2)


def test_llama3_frequencies_are_written_as_factors(make_target):
    config = copy.deepcopy(make_target("llama").config)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    expected = []
    for place in range(config.head_dim // 2):
        length = 2 * math.pi * 10000.0 ** (2 * place / config.head_dim)
        smooth = min(max((64 / length - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / 8.0 + smooth))
    torch.testing.assert_close(rotary_factors(config), torch.tensor(expected))
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(ValueError, match="rotary embeddings of type 'yarn'"):
        rotary_factors(config)


# -- EAGLE-3


@pytest.mark.parametrize("reduced", [True, False])
def test_eagle3_file(tmp_path, target, tokenizer, reduced):
    options = {"draft_vocab_size": 40, "token_counts": torch.arange(VOCABULARY) % 9} if reduced else {}
    drafter = PPOWDrafter.from_target(target, "eagle", target_layer_ids=[1, 2, 3], **options)
    drafter.attach_target(target)
    write_eagle3(tmp_path / "drafter.gguf", drafter, tokenizer, "float32")
    fields, tensors = read(tmp_path / "drafter.gguf")
    assert fields["general.architecture"] == "eagle3" and fields["eagle3.block_count"] == 1
    assert fields["eagle3.target_layers"] == [1, 2, 3]
    assert fields["eagle3.target_hidden_size"] == target.config.hidden_size
    assert fields["eagle3.vocab_size"] == VOCABULARY == len(fields["tokenizer.ggml.tokens"])
    ours = drafter.state_dict()
    scales = np.repeat(drafter.config.state_scales, target.config.hidden_size).astype(np.float32)
    assert np.array_equal(tensors["fc.weight"], ours["draft_model.fc.weight"].numpy() * scales)
    assert np.array_equal(tensors["token_embd.weight"], target.get_input_embeddings().weight.numpy())
    assert np.array_equal(tensors["blk.0.attn_norm_2.weight"], ours["draft_model.midlayer.hidden_norm.weight"].numpy())
    if reduced:
        kept = [token for token in range(VOCABULARY) if drafter.t2d[token]]
        assert tensors["d2t"].tolist() == kept and len(tensors["output.weight"]) == 40
    else:
        assert "d2t" not in tensors and "t2d" not in tensors
    write_eagle3(tmp_path / "drafter.gguf", drafter, tokenizer, "float16", embeddings=False)
    assert "token_embd.weight" not in read(tmp_path / "drafter.gguf")[1]


@pytest.mark.parametrize("number_format", ["float16", "q8_0"])
def test_what_float16_cannot_hold_is_kept_in_float32(tmp_path, target, tokenizer, number_format):
    drafter = PPOWDrafter.from_target(target, "eagle", target_layer_ids=[1, 2, 3], state_scales=[2.0**-14] * 3)
    drafter.attach_target(target)
    write_eagle3(tmp_path / "drafter.gguf", drafter, tokenizer, number_format)
    fields, tensors = read(tmp_path / "drafter.gguf")
    ours = drafter.state_dict()
    assert np.array_equal(tensors["fc.weight"], (ours["draft_model.fc.weight"] * 2.0**-14).numpy())
    others = tensors["blk.0.ffn_up.weight"], ours["draft_model.midlayer.mlp.up_proj.weight"].numpy()
    assert not np.array_equal(*others)  # rounded, as asked for


# -- tokenizers


def test_vocabulary_says_what_each_token_is(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens("<tool>")
    found = gguf_vocabulary(tokenizer, VOCABULARY)
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found.types[:2] == [CONTROL, CONTROL] and found.types[2] == NORMAL
    assert found.tokens[len(tokenizer) - 1] == "<tool>" and found.types[len(tokenizer) - 1] == USER_DEFINED
    assert found.types[len(tokenizer) :] == [UNUSED] * (VOCABULARY - len(tokenizer))
    assert len(set(found.tokens)) == VOCABULARY
    assert found.special_ids == {"eos": 0, "bos": 1} and not found.adds_bos
    with pytest.raises(ValueError, match="tokens for a model of 100"):
        gguf_vocabulary(tokenizer, 100)


def split_by(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]), "smollm"),
        *((split_by(pattern), name) for pattern, name in SPLIT_NAMES.items()),
    ],
)
def test_splitting_rules_have_llama_cpps_names(pre_tokenizer, name):
    assert gguf_vocabulary(make_tokenizer(pre_tokenizer), VOCABULARY).pre_tokenizer == name


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTE_LEVEL]),
        split_by(r"\s+"),
        pre_tokenizers.Metaspace(),
    ],
)
def test_other_splitting_rules_are_refused(pre_tokenizer):
    with pytest.raises(ValueError, match="splits texts by other rules than gpt-2, smollm, llama-bpe, qwen2"):
        gguf_vocabulary(make_tokenizer(pre_tokenizer), VOCABULARY)


# -- the export and its command


def test_export_writes_file_and_readme(tmp_path, target, tokenizer):
    drafter = PPOWDrafter.from_target(target, "eagle", target_layer_ids=[1, 2, 3])
    report = export_drafter(drafter, tmp_path, "gguf", target=target, tokenizer=tokenizer, gguf_dtype="q8_0")
    assert report.layout == "gguf" and report.files == ["README.md", "drafter-q8_0.gguf"] and report.notes == []
    readme = (tmp_path / "README.md").read_text()
    assert f"{tmp_path.name}/drafter-q8_0.gguf --spec-type draft-eagle3" in readme and "DRAFT_EAGLE3" in readme
    export_drafter(drafter, tmp_path, "gguf", target=target, tokenizer=tokenizer)  # another format beside it
    assert (tmp_path / "drafter-f16.gguf").is_file() and (tmp_path / "drafter-q8_0.gguf").is_file()


def test_wrong_requests_are_refused(tmp_path, make_target, target, tokenizer, monkeypatch):
    drafter = PPOWDrafter.from_target(target, "eagle", target_layer_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="tokenizer: a GGUF file holds its tokenizer; pass the target's"):
        export_drafter(drafter, tmp_path, "gguf", target=target)
    with pytest.raises(ValueError, match="gguf_dtype: 'q4_0' is not one of"):
        export_drafter(drafter, tmp_path, "gguf", target=target, tokenizer=tokenizer, gguf_dtype="q4_0")
    with pytest.raises(ValueError, match="model: a gpt2 model; GGUF is written for llama, qwen2, qwen3"):
        write_causal_lm(tmp_path / "x.gguf", make_target("gpt2"), tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "ppow-hf\[gguf\]"'):
        export_drafter(drafter, tmp_path, "gguf", target=target, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_export_command(tmp_path, capsys):
    command = ["export", "tiny-standalone", "--output-dir", str(tmp_path), "--format"]
    assert cli.main([*command, "gguf", "--dtype", "q8_0"]) == 0
    assert "drafter-q8_0.gguf" in capsys.readouterr().out
    fields, _ = read(tmp_path / "drafter-q8_0.gguf")
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert cli.main([*command, "vllm", "--dtype", "q8_0"]) == 2
    assert "--dtype: q8_0 is for --format gguf" in capsys.readouterr().err
