"""What rows give a chat template beside plain messages: written as the template writes it, or refused by row."""

import copy
import json

import pytest
from transformers import AutoTokenizer

from ppow_hf.data.sequences import extract_prompts, prepare_sequences
from ppow_hf.data.writing import read_conversations
from ppow_hf.tiny import target_path

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% if style is defined %}STYLE {{ style }}\n{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [{"role": "user", "content": "one and two?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "three"}]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(target_path()))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(rows, tokenizer) -> list[str]:
    sequences = prepare_sequences(rows, tokenizer, 1000)
    return [tokenizer.decode(sequences[number]["input_ids"]) for number in range(len(sequences))]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]])
def test_tools_enter_the_text(tokenizer, tools, tmp_path):
    """TRL: a `tools` column, as lists or as JSON, is part of what the model reads."""
    wanted = tokenizer.apply_chat_template(ANSWERED, tools=TOOLS, tokenize=False)
    assert wanted.startswith("TOOLS")
    assert written([{"messages": ANSWERED, "tools": tools}], tokenizer) == [wanted]
    prompt = tokenizer.apply_chat_template(ASKED, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    prompts = extract_prompts([{"messages": ANSWERED, "tools": tools}], tokenizer, 1000)
    assert tokenizer.decode(prompts[0]) == prompt

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ASKED, "tools": tools}) + "\n" + json.dumps({"messages": ASKED}) + "\n")
    conversations, _ = read_conversations(str(path), [0.0])
    request = conversations[0].request(tokenizer, 0)
    assert tokenizer.decode(request.prompt_ids) == prompt and request.template_inputs == {"tools": TOOLS}
    assert len(conversations) == 2 and conversations[1].request(tokenizer, 0).template_inputs == {}


def test_settings_of_the_template_enter_it(tokenizer):
    """TRL: `chat_template_kwargs` of a row, such as whether a model thinks."""
    rows = [{"messages": ANSWERED, "chat_template_kwargs": {"style": "short"}}, {"messages": ANSWERED}]
    assert [text.startswith("STYLE short") for text in written(rows, tokenizer)] == [True, False]


def test_the_nulls_of_arrow_do_not_enter_the_text(tokenizer):
    """datasets: Arrow gives all tool calls of a column the same arguments, null where a row has none."""
    from datasets import Dataset

    def chat(**arguments):
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        return {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    rows = [chat(a=1), chat(b="x")]
    wanted = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    assert not any("null" in text for text in wanted)
    padded = Dataset.from_list(rows)
    assert padded[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    assert written(padded, tokenizer) == wanted
    assert written(padded.to_iterable_dataset(), tokenizer) == wanted


def test_nulls_that_a_user_wrote_stay(tokenizer):
    """transformers: an argument may be null."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"unit": None}}}
    rows = [{"messages": [*ASKED, {"role": "assistant", "tool_calls": [call]}]}]
    assert '"unit": null' in written(rows, tokenizer)[0]


def test_text_parts_are_written_as_text(tokenizer):
    """vLLM: clients send contents as lists of parts."""
    parts = [{"type": "text", "text": "one and "}, {"type": "text", "text": "two?"}]
    rows = [{"messages": [{"role": "user", "content": parts}, ANSWERED[1]]}]
    wanted = written([{"messages": ANSWERED}], tokenizer)
    assert written(rows, tokenizer) == wanted
    other = copy.deepcopy(tokenizer)  # one that takes nothing but parts, as some vision models' do
    other.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}?{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    answer = {"role": "assistant", "content": [{"type": "text", "text": "three"}]}
    assert written([{"messages": [rows[0]["messages"][0], answer]}], other) == wanted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]}, "row 1.*kind 'image'"),
        ({"messages": [{"role": "user", "content": 7}]}, "row 1.*kind 'int'"),
        ({"messages": [{"role": "user", "content": "half \ud83d"}]}, "row 1.*lone surrogate"),
        ({"messages": ANSWERED, "tools": "{not json"}, "`tools` of row 1 is not JSON"),
        ({"messages": ANSWERED, "tools": [{"name": "\ud83d"}]}, "row 1.*lone surrogate"),
        ({"messages": ANSWERED, "tools": 3}, "`tools` of row 1 is a int"),
    ],
    ids=["image", "number", "surrogate", "json", "surrogate in tools", "tools"],
)
def test_what_no_template_can_write_is_refused_by_row(tokenizer, row, message):
    """tokenizers: a lone surrogate is no text; transformers: parts of other kinds than text."""
    with pytest.raises(ValueError, match=f"^train_dataset: .*{message}"):
        prepare_sequences([{"messages": ANSWERED}, row], tokenizer, 1000)


def test_an_error_inside_a_template_names_the_row(tokenizer):
    """transformers: templates fail in their own ways on values that they did not expect."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.role + 1 }}{% endfor %}"
    with pytest.raises(ValueError, match="^train_dataset: the tokenizer's chat template refuses row 0"):
        prepare_sequences([{"messages": ANSWERED}], other, 1000)


PARTS_ALONE = (
    "{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_strings_are_written_by_a_template_that_writes_parts_alone():
    """TRL, SmolVLM, LLaVA: a string has no parts, and its words would vanish."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(target_path()))
    tokenizer.chat_template = PARTS_ALONE
    (prompt,) = extract_prompts([{"messages": ASKED}], tokenizer, 64)
    assert tokenizer.decode(prompt) == "user:one and two?<end>assistant:"
    (sequence,) = prepare_sequences([{"messages": ANSWERED}], tokenizer, 64)
    assert tokenizer.decode(sequence["input_ids"][sequence["loss_mask"]]).startswith("three")
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in ANSWERED]
    (same,) = prepare_sequences([{"messages": parts}], tokenizer, 64)
    assert same["input_ids"].tolist() == sequence["input_ids"].tolist()


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<end_of_turn>"])
def test_nothing_is_learned_after_the_token_that_ends_a_turn(eos):
    """NeMo AutoModel, Gemma: a turn ends with another special token than a text, and a line feed follows."""
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(target_path()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.eos_token = eos
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
    )
    (sequence,) = prepare_sequences([{"messages": ANSWERED * 2}], tokenizer, 200)
    learned = tokenizer.decode(sequence["input_ids"][sequence["loss_mask"]])
    assert learned == "three<end_of_turn>three<end_of_turn>"
