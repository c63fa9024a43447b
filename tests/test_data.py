"""Behaviour of `ppow_hf.data.sequences`: a real byte-level tokenizer, a random tiny Llama target, real files."""

import copy
import gzip
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppow_hf.data.regeneration import regenerate
from ppow_hf.data.rows import read_rows
from ppow_hf.data.sequences import SequenceDataset, collate_sequences, extract_prompts, prepare_sequences

BOS, EOS, PAD, TURN = "<|begin|>", "<|end|>", "<|pad|>", "<|turn|>"
LINES = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "The drafter proposes a window; the target verifies it.\n",
    "for value in values:\n    print(value)\n",
    "Was grünt so grün? Übermut tut selten gut.\n",
]
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it green?"},
    {"role": "assistant", "content": "Ja, grün."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "No."},
]


def build_tokenizer(bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS, PAD, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, "\n\n\n\n"], trainer=trainer)
    if bos:
        begin = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, begin)])
    special = {"bos_token": BOS} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, **special)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(template=PLAIN_TEMPLATE)


@pytest.fixture(scope="module")
def target(tokenizer):
    """Random weights, wide enough apart that greedy choices are not ties; one frequent token ends a completion."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([tokenizer(LINES[0])["input_ids"]])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, int(written[0, -3])]
    return model


@pytest.fixture
def forward_calls(target):
    calls: list[int] = []
    handle = target.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def token_lists(dataset: SequenceDataset) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in (dataset[i] for i in range(len(dataset)))]


def learned_text(item: dict, tokenizer) -> str:
    return tokenizer.decode(item["input_ids"][item["loss_mask"]])


# Texts


@pytest.mark.parametrize("bos", [True, False])
def test_packing_loses_no_token(bos):
    tokenizer = build_tokenizer(bos)
    dataset = prepare_sequences([{"text": line} for line in LINES], tokenizer, 16, min_length=1)
    expected = []
    for line in LINES:
        ids = tokenizer.backend_tokenizer.encode(line, add_special_tokens=False).ids
        expected += [tokenizer.bos_token_id, *ids] if bos else [*ids, tokenizer.eos_token_id]
    rows = token_lists(dataset)
    assert sum(rows, []) == expected
    assert {len(row) for row in rows[:-1]} == {16}


def test_packing_keeps_a_last_sequence_of_min_length_only(tokenizer):
    max_length = len(tokenizer(LINES[0])["input_ids"]) - 3
    for min_length, sequences in ((3, 2), (4, 1)):
        dataset = prepare_sequences([{"text": LINES[0]}], tokenizer, max_length, min_length=min_length)
        assert len(dataset) == sequences


def test_without_packing_each_text_is_cut_at_max_length(tokenizer):
    rows = token_lists(prepare_sequences([{"text": line} for line in LINES], tokenizer, 20, packing=False))
    assert rows == [tokenizer(line)["input_ids"][:20] for line in LINES]


def test_every_text_token_but_the_first_and_bos_is_learned(tokenizer):
    item = prepare_sequences([{"text": "a b c"}, {"text": "d e f"}], tokenizer, 64)[0]
    assert item["loss_mask"].tolist() == (item["input_ids"] != tokenizer.bos_token_id).tolist()
    assert not item["target_written"].any()
    without_bos = prepare_sequences([{"text": "a b c"}, {"text": "d e f"}], build_tokenizer(bos=False), 64)[0]
    assert without_bos["loss_mask"].tolist() == [False] + [True] * (len(without_bos["input_ids"]) - 1)


def test_a_text_that_begins_with_bos_is_not_opened_twice(tokenizer):
    assert token_lists(prepare_sequences([{"text": BOS + LINES[0]}], tokenizer, 512)) == [
        tokenizer(LINES[0])["input_ids"]
    ]


# Prompts with completions, token ids


def test_loss_is_on_the_completion_and_one_eos(tokenizer):
    rows = [{"prompt": "Is it green?", "completion": " Yes."}, {"prompt": f"{BOS}Is it?", "completion": f" No.{EOS}"}]
    dataset = prepare_sequences(rows, tokenizer, 64)
    assert [learned_text(dataset[i], tokenizer) for i in range(2)] == [f" Yes.{EOS}", f" No.{EOS}"]
    assert [tokenizer.decode(ids) for ids in token_lists(dataset)] == [
        f"{BOS}Is it green? Yes.{EOS}",
        f"{BOS}Is it? No.{EOS}",
    ]


@pytest.mark.parametrize("prepends", ["first", "always"])
def test_a_completion_has_the_tokens_that_it_has_after_its_prompt(prepends):
    """TRL: tokenizers of SentencePiece's kind put a space before a text of its own."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True)
    own = Tokenizer(model)
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepends)
    own.decoder = decoders.Metaspace(prepend_scheme=prepends)
    special = ["<unk>", "<s>", "</s>"]
    own.train_from_iterator(
        ["2+2=4 is the test", "1+1=2 is it"], trainers.BpeTrainer(vocab_size=60, special_tokens=special)
    )
    own = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    rows = [{"prompt": "2+2=", "completion": "4 is the test"}, {"prompt": "1", "completion": ""}]
    (item,) = prepare_sequences(rows, own, 64)
    joint = own("2+2=4 is the test", add_special_tokens=False)["input_ids"]
    assert item["input_ids"].tolist()[-len(joint) - 1 : -1] == joint and item["input_ids"][-1] == own.eos_token_id
    learned = item["input_ids"][item["loss_mask"]].tolist()
    assert joint[-len(learned) + 1 :] == learned[:-1] and len(learned) >= len(joint) - 4


def test_rows_without_a_learned_token_are_dropped_with_one_warning(tokenizer, caplog):
    rows = [{"prompt": "x" * 50, "completion": " Yes."}] * 3 + [{"prompt": "a", "completion": " Yes." * 50}]
    with caplog.at_level(logging.WARNING, logger="ppow_hf.data.sequences"):
        dataset = prepare_sequences(rows, tokenizer, 24)
    assert [len(ids) for ids in token_lists(dataset)] == [24]
    assert len(caplog.records) == 1 and "3 of 4" in caplog.records[0].getMessage()


def test_empty_rows_are_skipped(tokenizer):
    assert len(prepare_sequences([{"prompt": "a", "completion": c} for c in ("", None, "b")], tokenizer, 24)) == 1
    assert len(prepare_sequences([{"text": t} for t in ("", None, "b")], tokenizer, 24, packing=False)) == 1
    assert len(prepare_sequences([{"messages": m} for m in ([], None, CHAT)], tokenizer, 512)) == 1
    assert len(prepare_sequences([{"input_ids": i} for i in ([], None, [4, 5])], tokenizer, 24)) == 1


def test_token_ids_are_taken_as_they_are_and_cut(tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 1]}, {"input_ids": torch.tensor([5, 6])}]
    dataset = prepare_sequences(rows, tokenizer, 4)
    assert token_lists(dataset) == [[5, 6, 7, 8], [5, 6]]
    assert [dataset[i]["loss_mask"].tolist() for i in range(2)] == [[False, False, True, True], [False, True]]


def test_a_sequence_dataset_is_read_back_with_its_masks(tokenizer):
    written = [[False, False, True], [False, True]]
    dataset = SequenceDataset([[5, 6, 7], [8, 9]], written, written)
    again = prepare_sequences(dataset, tokenizer, 16)
    assert again.fingerprint == dataset.fingerprint
    assert [again[i]["target_written"].tolist() for i in range(2)] == written


# Chats


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "generation tag"])
def test_loss_in_chats_is_on_the_assistants_text_and_its_end(template):
    tokenizer = build_tokenizer(template=template)
    item = prepare_sequences([{"messages": CHAT}], tokenizer, 512)[0]
    assert item["input_ids"].tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert learned_text(item, tokenizer) == f"Ja, grün.{EOS}No.{EOS}"


def test_both_ways_to_find_the_assistants_tokens_agree():
    masks = []
    for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE):
        item = prepare_sequences([{"messages": CHAT}], build_tokenizer(template=template), 512)[0]
        masks.append((item["input_ids"].tolist(), item["loss_mask"].tolist()))
    assert masks[0] == masks[1]


def test_a_token_that_straddles_the_header_and_the_answer_is_not_learned(tokenizer):
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "\n Yes."}]
    item = prepare_sequences([{"messages": chat}], tokenizer, 512)[0]
    assert tokenizer.convert_tokens_to_ids("ĊĊ") in item["input_ids"]  # the two line feeds are one token
    assert learned_text(item, tokenizer) == f" Yes.{EOS}"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    last_turn_differs = PLAIN_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}",
    )
    tokenizer = build_tokenizer(template=last_turn_differs)
    with pytest.raises(ValueError, match=r"^my_argument: .*message 2 of row 0.*\{% generation %\}"):
        prepare_sequences([{"messages": CHAT}], tokenizer, 512, argument="my_argument")
    one_answer = prepare_sequences([{"messages": CHAT[:3]}], tokenizer, 512)[0]
    assert learned_text(one_answer, tokenizer).startswith("<think></think>")


def test_chat_errors_name_the_argument_and_the_row():
    refusing = build_tokenizer(template="{{ raise_exception('no system role') }}")
    for tokenizer, messages, message in (
        (build_tokenizer(), CHAT, "no chat template"),
        (refusing, CHAT, "refuses row 0.*no system role"),
        (build_tokenizer(template=PLAIN_TEMPLATE), CHAT[2:], "row 0 begins with an assistant"),
        (build_tokenizer(template=PLAIN_TEMPLATE), ["hello"], "row 0 is not a list of messages"),
        (build_tokenizer(template=PLAIN_TEMPLATE), 3, "row 0 is not a list of messages"),
    ):
        with pytest.raises(ValueError, match=f"^my_argument: .*{message}"):
            prepare_sequences([{"messages": messages}], tokenizer, 512, argument="my_argument")


# Batches


def test_batches_are_padded_on_the_right_and_labels_follow_the_loss_mask():
    dataset = SequenceDataset([[5, 6, 7], [8, 9]], [[1, 0, 1], [1, 1]], [[0, 0, 1], [0, 0]])
    batch = collate_sequences([dataset[1], dataset[0]], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[8, 9, 2], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [-100, -100, 7]]
    assert batch["loss_mask"].tolist() == [[False, True, False], [False, False, True]]
    assert batch["target_written"].tolist() == [[False, False, False], [False, False, True]]
    assert batch["index"].tolist() == [1, 0]
    assert batch["labels"].dtype == batch["attention_mask"].dtype == torch.long


def test_the_first_label_is_ignored_whatever_the_mask_says():
    item = {
        "input_ids": torch.tensor([5, 6]),
        "loss_mask": torch.tensor([True, True]),
        "target_written": torch.tensor([False, False]),
        "index": 0,
    }
    assert collate_sequences([item], pad_token_id=2)["labels"].tolist() == [[-100, 6]]


def test_the_loss_of_a_causal_model_on_a_batch_is_over_the_learned_tokens(target):
    dataset = SequenceDataset([[5, 6, 7, 8], [8, 9]], [[0, 0, 1, 1], [0, 1]])
    batch = collate_sequences([dataset[0], dataset[1]], pad_token_id=2)
    with torch.no_grad():
        names = ("input_ids", "attention_mask", "labels")
        loss = target(**{name: batch[name] for name in names}).loss
        log_probs = [target(torch.tensor([ids])).logits.log_softmax(-1)[0] for ids in ([5, 6, 7, 8], [8, 9])]
    expected = -(log_probs[0][1, 7] + log_probs[0][2, 8] + log_probs[1][0, 9]) / 3
    torch.testing.assert_close(loss, expected)


def test_the_fingerprint_tells_tokens_and_their_division_apart():
    def fingerprints(rows):
        dataset = SequenceDataset(rows, [[True] * len(row) for row in rows])
        return dataset.fingerprint, dataset.token_fingerprint

    assert fingerprints([[5, 6], [7]]) == fingerprints([[5, 6], [7]])
    others = [fingerprints(rows) for rows in ([[5, 6], [7]], [[5], [6, 7]], [[5, 6], [8]])]
    assert len({whole for whole, _ in others}) == len({tokens for _, tokens in others}) == 3


def test_the_fingerprint_tells_masks_apart_and_that_of_the_tokens_does_not():
    masks = ([[0, 1, 1]], None), ([[0, 0, 1]], None), ([[0, 1, 1]], [[0, 1, 1]]), ([[0, 1, 1]], [[0, 0, 1]])
    datasets = [SequenceDataset([[5, 6, 7]], learned, written) for learned, written in masks]
    assert len({dataset.fingerprint for dataset in datasets}) == 4
    # Caches and records of earlier versions hold this number; they stay readable.
    assert {dataset.token_fingerprint for dataset in datasets} == {"a2f6d2e6a160e6c4"}


# Prompts


def test_prompts_of_chats_end_where_the_assistant_would_begin(tokenizer):
    prompts = extract_prompts([{"messages": CHAT}], tokenizer, 512)
    expected = tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True)["input_ids"]
    assert prompts == [expected]


def test_long_prompts_keep_their_end_and_texts_their_beginning(tokenizer, caplog):
    ids = tokenizer(LINES[0])["input_ids"]
    with caplog.at_level(logging.WARNING, logger="ppow_hf.data.sequences"):
        assert extract_prompts([{"text": LINES[0]}, {"text": ""}], tokenizer, 10) == [ids[:10]]
        assert not caplog.records
        assert extract_prompts([{"prompt": LINES[0]}, {"prompt": "a"}], tokenizer, 10) == [
            [tokenizer.bos_token_id, *ids[-9:]],
            tokenizer("a")["input_ids"],
        ]
    assert len(caplog.records) == 1 and "1 of 2" in caplog.records[0].getMessage()
    without_bos = build_tokenizer(bos=False)
    ids = without_bos(LINES[0])["input_ids"]
    assert extract_prompts([{"prompt": LINES[0]}], without_bos, 10) == [ids[-10:]]


# Regeneration

PROMPTS = [{"prompt": prompt} for prompt in (*LINES, "a", "values", "sum(")]


def greedy_alone(prompt_ids, target, tokenizer, max_new_tokens):
    """One prompt, no padding, no cache: the argmax token by token."""
    ids = list(prompt_ids)
    ends = {tokenizer.eos_token_id, *target.generation_config.eos_token_id}
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(target(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids


def test_greedy_regeneration_equals_plain_generate_of_every_prompt_alone(target, tokenizer, tmp_path):
    options = {"max_length": 96, "max_new_tokens": 12, "cache_dir": tmp_path}
    dataset = regenerate(PROMPTS, target, tokenizer, batch_size=4, **options)
    stopped_early = 0
    for row, item in zip(PROMPTS, (dataset[i] for i in range(len(dataset))), strict=True):
        prompt = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        alone = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        assert item["input_ids"].tolist() == alone[0].tolist()
        on_completion = [False] * prompt.shape[1] + [True] * (alone.shape[1] - prompt.shape[1])
        assert item["loss_mask"].tolist() == item["target_written"].tolist() == on_completion
        stopped_early += alone.shape[1] < prompt.shape[1] + 12
    assert 0 < stopped_early < len(PROMPTS)  # both kinds of ends were seen


def test_greedy_regeneration_ignores_the_targets_own_sampling_and_penalties(target, tokenizer, tmp_path):
    plain = regenerate(PROMPTS, target, tokenizer, max_length=96, max_new_tokens=16, cache_dir=tmp_path / "plain")
    other = copy.deepcopy(target)
    other.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=3, no_repeat_ngram_size=2)
    again = regenerate(PROMPTS, other, tokenizer, max_length=96, max_new_tokens=16, cache_dir=tmp_path / "penalties")
    assert token_lists(plain) == token_lists(again)


def test_completions_end_at_max_length_whatever_the_batch(target, tokenizer, tmp_path):
    options = {"max_length": 24, "max_new_tokens": 16, "batch_size": 3, "cache_dir": tmp_path}
    dataset = regenerate(PROMPTS, target, tokenizer, **options)
    for row, ids in zip(PROMPTS, token_lists(dataset), strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        kept = prompt if len(prompt) <= 12 else [prompt[0], *prompt[-11:]]
        assert ids == greedy_alone(kept, target, tokenizer, min(16, 24 - len(kept)))


def test_regeneration_leaves_the_target_and_the_random_state_as_they_were(target, tokenizer, tmp_path):
    model = copy.deepcopy(target).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    own, before = model.generation_config, model.generation_config.to_dict()
    random_state = torch.get_rng_state()
    regenerate(PROMPTS, model, tokenizer, max_length=96, max_new_tokens=4, temperature=1.0, cache_dir=tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own and own.to_dict() == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_samples_depend_on_the_seed_alone_and_are_not_marked_as_greedy(target, tokenizer, tmp_path):
    def sample(seed: int, folder: str) -> SequenceDataset:
        torch.rand(7)  # whatever the global generator did before
        return regenerate(
            PROMPTS,
            target,
            tokenizer,
            max_length=96,
            max_new_tokens=8,
            temperature=1.5,
            seed=seed,
            cache_dir=tmp_path / folder,
        )

    first, again, other = sample(0, "a"), sample(0, "b"), sample(1, "a")
    assert token_lists(first) == token_lists(again) != token_lists(other)
    assert first[0]["loss_mask"].any() and not first[0]["target_written"].any()


def test_prompts_take_several_temperatures_in_turn(target, tokenizer, tmp_path):
    options = {"max_length": 96, "max_new_tokens": 6, "cache_dir": tmp_path}
    mixed = regenerate(PROMPTS, target, tokenizer, temperature=[0.0, 1.5], **options)
    greedy = regenerate(PROMPTS, target, tokenizer, **options)
    sampled = regenerate(PROMPTS[1::2], target, tokenizer, temperature=1.5, **options)
    assert len(mixed) == len(PROMPTS) >= 3
    for place in range(len(PROMPTS)):
        expected = sampled[place // 2] if place % 2 else greedy[place]
        for name in ("input_ids", "loss_mask", "target_written"):
            assert torch.equal(mixed[place][name], expected[name]), (place, name)
    again = regenerate(PROMPTS, target, tokenizer, temperature=[0.0, 1.5], **options)
    assert again.fingerprint == mixed.fingerprint != greedy.fingerprint
    few = regenerate(PROMPTS[:2], target, tokenizer, temperature=[0.0, 1.5, 2.0], **options)
    alone = regenerate(PROMPTS[1:2], target, tokenizer, temperature=1.5, **options)
    assert len(few) == 2
    assert torch.equal(few[0]["input_ids"], greedy[0]["input_ids"])
    assert torch.equal(few[1]["input_ids"], alone[0]["input_ids"])


def test_samples_follow_the_targets_distribution_at_the_temperature(target, tokenizer, tmp_path):
    repeats, temperature = 2000, 2.0
    dataset = regenerate(
        [{"prompt": "a"}] * repeats,
        target,
        tokenizer,
        max_length=16,
        max_new_tokens=1,
        temperature=temperature,
        batch_size=500,
        cache_dir=tmp_path,
    )
    prompt = torch.tensor([tokenizer("a")["input_ids"]])
    with torch.no_grad():
        expected = (target(prompt).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([ids[-1] for ids in token_lists(dataset)]), minlength=len(expected))
    distance = (counts / repeats - expected).abs().sum() / 2
    # Total variation of an empirical distribution: at most 0.5 * sum sqrt(p (1 - p) / n) on average.
    bound = 0.5 * (expected * (1 - expected) / repeats).sqrt().sum()
    assert distance < 1.3 * bound


def test_a_second_call_reads_the_same_sequences_without_the_target(target, tokenizer, tmp_path, forward_calls):
    options = {"max_length": 96, "max_new_tokens": 8, "cache_dir": tmp_path}
    first = regenerate(PROMPTS, target, tokenizer, **options)
    assert forward_calls
    forward_calls.clear()
    second = regenerate(PROMPTS, target, tokenizer, batch_size=2, seed=5, **options)  # neither matters at T = 0
    assert not forward_calls
    for i in range(len(first)):
        for name in ("input_ids", "loss_mask", "target_written"):
            assert torch.equal(first[i][name], second[i][name]) and first[i][name].dtype == second[i][name].dtype
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    metadata = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert metadata["fingerprint"] == first.token_fingerprint


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_call_is_gone_on_from(target, tokenizer, tmp_path, forward_calls, monkeypatch, temperature):
    options = {"max_length": 96, "max_new_tokens": 8, "batch_size": 2, "temperature": temperature}
    rows = PROMPTS[:7]
    expected = regenerate(rows, target, tokenizer, cache_dir=tmp_path / "whole", **options)
    all_calls = len(forward_calls)
    generate, written = type(target).generate, []

    def interrupted(*args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        return generate(*args, **kwargs)

    folder = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(target), "generate", interrupted)
        regenerate(rows, target, tokenizer, cache_dir=folder, **options)
    (part,) = folder.iterdir()
    assert len(part.read_text().splitlines()) == 4
    part.write_text(part.read_text()[:-3])  # killed while the last line was written

    forward_calls.clear()
    found = regenerate(rows, target, tokenizer, cache_dir=folder, **options)
    assert found.fingerprint == expected.fingerprint
    assert 0 < len(forward_calls) < all_calls
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_other_prompts_settings_or_weights_are_not_read_from_the_cache(target, tokenizer, tmp_path):
    options = {"max_length": 96, "max_new_tokens": 8, "cache_dir": tmp_path}
    regenerate(PROMPTS, target, tokenizer, **options)
    regenerate(PROMPTS[:-1], target, tokenizer, **options)
    regenerate(PROMPTS, target, tokenizer, **{**options, "max_new_tokens": 7})
    regenerate(PROMPTS, target, tokenizer, temperature=1.0, **options)
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    regenerate(PROMPTS, other, tokenizer, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".safetensors", truncate),
        (".safetensors", flip_a_bit),
        (".safetensors", lambda path: path.write_bytes(b"")),
        (".safetensors", lambda path: path.unlink()),
        (".json", truncate),
        (".json", lambda path: path.write_text("{}")),
    ],
    ids=["truncated", "bit flipped", "emptied", "removed", "truncated metadata", "empty metadata"],
)
def test_a_damaged_cache_is_deleted_and_written_anew(
    target, tokenizer, tmp_path, forward_calls, caplog, suffix, damage
):
    options = {"max_length": 96, "max_new_tokens": 4, "cache_dir": tmp_path}
    first = regenerate(PROMPTS[:3], target, tokenizer, **options)
    damage(next(tmp_path.glob(f"*{suffix}")))
    forward_calls.clear()
    with caplog.at_level(logging.WARNING, logger="ppow_hf.data.regeneration"):
        second = regenerate(PROMPTS[:3], target, tokenizer, **options)
    assert forward_calls and "damaged" in caplog.text
    assert second.fingerprint == first.fingerprint
    forward_calls.clear()
    regenerate(PROMPTS[:3], target, tokenizer, **options)
    assert not forward_calls


def test_the_default_cache_is_below_hf_home(target, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    regenerate(PROMPTS[:1], target, tokenizer, max_length=96, max_new_tokens=1)
    assert len(list((tmp_path / "hub" / "ppow_hf" / "regenerated").glob("*.safetensors"))) == 1
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    regenerate(PROMPTS[:1], target, tokenizer, max_length=96, max_new_tokens=1)
    assert len(list((tmp_path / "home" / ".cache" / "ppow_hf" / "regenerated").glob("*.safetensors"))) == 1


def test_a_prompt_that_fills_the_context_is_refused(target, tokenizer, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "xyz" * 60}]
    with pytest.raises(ValueError, match=r"^my_argument: prompt 1 \('<\|begin\|>xyz.*context of 96.*max_length"):
        regenerate(
            rows, target, tokenizer, max_length=512, max_new_tokens=8, cache_dir=tmp_path, argument="my_argument"
        )


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("max_new_tokens", 0), ("batch_size", 0), ("max_length", 1)]
)
def test_settings_out_of_range_are_named(target, tokenizer, tmp_path, name, value):
    options = {"max_length": 96, "max_new_tokens": 8, "cache_dir": tmp_path, name: value}
    with pytest.raises(ValueError, match=f"^{name}: {value}"):
        regenerate(PROMPTS, target, tokenizer, **options)


# Sources


def test_files_give_the_rows_that_were_written(tmp_path):
    rows = [{"text": line, "more": [1]} for line in LINES]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "rows.txt").write_text("".join(LINES), encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl", "eval_dataset") == rows
    assert read_rows(str(tmp_path / "rows.jsonl.gz"), "eval_dataset") == rows
    assert read_rows(tmp_path / "rows.txt", "eval_dataset") == [{"text": "".join(LINES)}]
    assert read_rows(iter(rows), "eval_dataset") == rows


def test_a_dataset_of_the_datasets_library_is_read(tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": line} for line in LINES]
    from_dataset = prepare_sequences(datasets.Dataset.from_list(rows), tokenizer, 32)
    assert from_dataset.fingerprint == prepare_sequences(rows, tokenizer, 32).fingerprint
    chats = datasets.Dataset.from_list([{"messages": CHAT, "id": 3}])
    assert token_lists(prepare_sequences(chats, tokenizer, 512)) == [tokenizer.apply_chat_template(CHAT)["input_ids"]]
    with pytest.raises(ValueError, match=r"^train_dataset: .*\['train'\].*one split"):
        prepare_sequences(datasets.DatasetDict({"train": chats}), tokenizer, 32)


def test_damaged_files_are_named_with_the_line(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 2000)
    for name, content, message in (
        ("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is not JSON"),
        ("latin.jsonl", '{"text": "a"}\n\n{"text": "ü"}\n'.encode("latin-1"), "line 3 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "line 1 is a list"),
        ("cut.jsonl.gz", whole[: len(whole) // 2], "damaged after line"),
        ("not.jsonl.gz", b'{"text": "a"}\n', "damaged after line 0"),
        ("latin.txt", "ü".encode("latin-1"), "not UTF-8"),
        ("rows.csv", b"text\na\n", "neither .jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^eval_dataset: .*{name}.*{message}"):
            read_rows(tmp_path / name, "eval_dataset")


def test_a_missing_file_names_the_argument(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^eval_dataset: .*none\.jsonl"):
        read_rows(tmp_path / "none.jsonl", "eval_dataset")
    with pytest.raises(ValueError, match=r"^eval_dataset: the dataset 'organisation/dataset' could not be loaded"):
        read_rows("organisation/dataset", "eval_dataset")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no rows"),
        (None, "NoneType given"),
        (["some text"], "row 0 is a str"),
        ([{"body": "a", "id": 1}], r"columns \['body', 'id'\].*`text`"),
        ([{"text": "a"}, {"body": "a"}], "row 1 .*lacks"),
        ([{"text": 3}], "row 0 is a int"),
        ([{"prompt": "a"}], "regenerate=True"),
        ([{"text": ""}], "no row gives"),
        ([{"input_ids": [4, -100]}], "row 0 has the .*-100"),
        ([{"input_ids": "abc"}], "row 0 is not a flat list"),
        ([{"input_ids": [[4, 5]]}], "row 0 is not a flat list"),
        ([{"input_ids": [4, 5], "loss_mask": [1]}], "`loss_mask` of row 0 has 1 entries for 2"),
    ],
)
def test_unreadable_datasets_name_the_argument(tokenizer, source, message):
    with pytest.raises(ValueError, match=f"^my_argument: .*{message}"):
        prepare_sequences(source, tokenizer, 32, argument="my_argument")


def test_a_dataset_without_prompts_is_refused(tokenizer):
    for source, message in (
        ([{"prompt": ""}], None),
        ([{"messages": CHAT[:1]}], "none of the 1 rows"),
        ([{"input_ids": [4, 5]}], "columns"),
    ):
        if message is None:  # a tokenizer with bos makes a prompt of the empty string; one without does not
            with pytest.raises(ValueError, match="^my_argument: none of the 1 rows"):
                extract_prompts(source, build_tokenizer(bos=False), 8, argument="my_argument")
        else:
            with pytest.raises(ValueError, match=f"^my_argument: .*{message}"):
                extract_prompts(source, tokenizer, 8, argument="my_argument")
