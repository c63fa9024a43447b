"""What `ppow write` writes: the embedded target with a small chat template, a real file, a real local server."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import PPOWDrafter, cli, tiny
from ppow_hf.data import models as loading
from ppow_hf.data.sequences import prepare_sequences
from ppow_hf.data.writing import (
    Answer,
    TextFile,
    is_looping,
    opening_of_user_turn,
    read_conversations,
    reason_to_drop,
    write_texts,
)

CHATML = (
    "{% for message in messages %}<|pad|>{{ message['role'] }}\n{{ message['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant\n{% endif %}"
)
# Nearer to what the embedded target has read: a question is a function's head, and the answer its first line.
CODE_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}def {{ message['content'] }}{{ '\n   ' }}"
    "{% else %}{{ message['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
PROMPTS = ["def mean(values):", "import os\n", "class Point:\n    def __init__(self", "for line in", "return x if"]
CHATS = [
    [{"role": "user", "content": question} for question in questions]
    for questions in (
        ("is_empty(stack):", "setUp(self):", "pop(stack):"),
        ("add(a, b):", "main():"),
        ("read_file(path, mode='r'):", "main():"),
    )
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(tiny.target_path())
    tokenizer.chat_template = CODE_CHAT
    return tokenizer


@pytest.fixture(scope="module")
def target():
    """The embedded target in float32."""
    return AutoModelForCausalLM.from_pretrained(tiny.target_path(), dtype=torch.float32).eval()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(*argv):
    assert cli.main(["write", *map(str, argv)]) == 0


def fails(capsys, *argv):
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def greedily(target, prompt_ids, max_new_tokens):
    ids = torch.tensor([prompt_ids])
    output = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(prompt_ids) :].tolist()


def looping(tokens):
    """Ten lines, by the letter: some passage stands three times at the end, 24 tokens or more in all."""
    for length in range(1, len(tokens) // 3 + 1):
        copies = [tokens[len(tokens) - length * (n + 1) : len(tokens) - length * n] for n in range(3)]
        if copies[0] == copies[1] == copies[2] and 3 * length >= 24:
            return True
    return False


# Prompts


def test_each_prompt_is_taken_once_and_takes_the_temperatures_in_turn(tmp_path):
    rows = [{"prompt": "a b"}, {"prompt": "a  b"}, {"prompt": " "}, {"prompt": "c"}, {"prompt": "d"}, {"prompt": "c"}]
    conversations, left_out = read_conversations(str(write_rows(tmp_path / "p.jsonl", rows)), [0.0, 1.0])
    assert [(one.text, one.temperature) for one in conversations] == [("a b", 0.0), ("c", 1.0), ("d", 0.0)]
    assert left_out == 3


def test_lines_of_a_text_file_and_columns_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    conversations, _ = read_conversations(str(tmp_path / "p.txt"), [0.0])
    assert [one.text for one in conversations] == ["one", "two"]
    path = write_rows(tmp_path / "q.jsonl", [{"question": "Why?"}])
    conversations, _ = read_conversations(f"{path}:question", [0.0], chat=True)
    assert conversations[0].pending == [[{"role": "user", "content": "Why?"}]]
    with pytest.raises(ValueError, match="--prompts: row 0 has the columns .*question"):
        read_conversations(str(path), [0.0])


def test_all_user_turns_of_a_chat_are_asked_and_its_assistants_left_out(tmp_path):
    system, first, answer, second = (
        {"role": role, "content": content}
        for role, content in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    )
    path = write_rows(tmp_path / "p.jsonl", [{"messages": [system, first, answer, second, answer]}])
    conversations, _ = read_conversations(str(path), [0.0])
    assert conversations[0].pending == [[system, first], [second]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "number.jsonl"], "--prompts: `messages` of row 0 is not a list of messages"),
        (["--prompts", "latin.txt"], "--prompts: 'latin.txt' is not UTF-8 text"),
        (["--prompts", "p.txt:foo"], "--prompts: 'p.txt:foo' given, and each line of a .txt file is a prompt"),
        (["--prompts", "p.txt", "--device", "foo"], "--device: 'foo' cannot be used: "),
        (["--prompts", "p.txt", "--engine-python", "x"], "--engine-python: 'x' given without --engine"),
        (["--self-prompted", 2, "--num-prompts", 1], "--num-prompts: 1 given without --prompts"),
        (["--prompts", "p.txt", "--temperature", 0, -1], "--temperature: -1.0 given"),
        (["--prompts", "p.txt", "--output", "other.jsonl"], "--output: the settings would be in 'other.json', which"),
        (["--prompts", "p.txt", "--output", "list.jsonl"], "--output: the settings would be in 'list.json', which"),
    ],
)
def test_bad_input_is_refused_by_name_before_the_target_is_loaded(tmp_path, capsys, monkeypatch, words, message):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_load", load)
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "number.jsonl": b'{"messages": 5}\n',
        "latin.txt": b"caf\xe9\n",
        "p.txt": b"a\n",
        "other.json": b'{"a": 1}',
        "list.json": b"[1",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert message in fails(capsys, "write", "--target", "tiny", "--output", "texts.jsonl", *words)


@pytest.mark.parametrize("line", ['{"a": 1}', '{"id":', "5"])
def test_rows_of_something_else_are_no_texts_to_go_on_with(tmp_path, line):
    TextFile(tmp_path / "texts.jsonl", {})
    (tmp_path / "texts.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="--output: '.*texts.jsonl', line 1 is no row of this command"):
        TextFile(tmp_path / "texts.jsonl", {})


# What is kept


def test_loops_are_what_repeats_three_times_at_the_end():
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(300):
        length, copies, before = (int(torch.randint(1, 14, (1,), generator=generator)) for _ in range(3))
        passage = torch.randint(2, (length,), generator=generator).tolist()
        tokens = torch.randint(9, (before,), generator=generator).tolist() + passage * copies
        assert is_looping(tokens) == looping(tokens)
        found += looping(tokens)
    assert 30 < found < 270


def test_answers_are_dropped_for_a_reason():
    seen: set[str] = set()
    assert reason_to_drop(Answer(" \n", [3, 0], True), seen) == "empty"
    assert reason_to_drop(Answer("ab", [*[5, 6] * 15, 0], True), seen) == "looping"
    assert reason_to_drop(Answer("yes  sir", [7, 8], False), seen) is None
    assert reason_to_drop(Answer("yes sir\n", [7, 9, 8], False), seen) == "repeated"
    assert reason_to_drop(None, seen) == "refused"


def test_a_file_that_is_gone_on_with_knows_what_the_target_wrote_and_not_what_it_was_asked(tmp_path):
    asked = {
        "id": "0",
        "messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes."}],
    }
    own = {"id": "self-0-1", "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (asked, own)))
    (tmp_path / "texts.json").write_text('{"settings": {}}')
    seen = TextFile(tmp_path / "texts.jsonl", {}).seen
    answers = ["Say yes.", "Yes.", "Who?", "I."]
    assert [reason_to_drop(Answer(text, [7, 8], True), seen) for text in answers] == [None, *["repeated"] * 3]


# Transformers


def test_greedy_rows_are_what_plain_generate_writes_and_train_as_such(target, tokenizer, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    out = tmp_path / "texts.jsonl"
    argv = ["--target", "tiny", "--dtype", "float32", "--prompts", prompts, "--output", out]
    write(*argv, "--temperature", 0, 1, "--max-new-tokens", 16, "--batch-size", 2)
    printed = capsys.readouterr().out
    rows = {row["prompt"]: row for row in read(out)}
    dropped = read(out.with_suffix(".dropped.jsonl")) if out.with_suffix(".dropped.jsonl").exists() else []
    assert set(rows) | {row["prompt"] for row in dropped} == set(PROMPTS) and "tokens/s" in printed
    assert all(row["reason"] in printed for row in dropped)
    greedy = [row for row in rows.values() if row["temperature"] == 0]
    assert greedy and len(greedy) < len(rows)
    for row in rows.values():
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["temperature"] == [0.0, 1.0][PROMPTS.index(row["prompt"]) % 2]
    for row in greedy:
        assert row["completion_ids"] == greedily(target, row["prompt_ids"], 16)

    data = prepare_sequences(str(out), tokenizer, 128)
    for item, row in zip(data, read(out), strict=True):
        own = [False] * len(row["prompt_ids"]) + [True] * len(row["completion_ids"])
        assert item["input_ids"].tolist() == row["prompt_ids"] + row["completion_ids"]
        assert item["loss_mask"].tolist() == own
        assert item["target_written"].tolist() == (own if row["temperature"] == 0 else [False] * len(own))


@pytest.fixture(scope="module")
def brief(target, tokenizer, tmp_path_factory):
    """A target that ends what it writes with the line, and its folder."""
    folder = tmp_path_factory.mktemp("brief")
    brief = copy.deepcopy(target)
    newlines = [token for word, token in tokenizer.get_vocab().items() if word.startswith("Ċ")]
    brief.generation_config.eos_token_id = sorted([tokenizer.eos_token_id, *newlines])
    brief.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return brief, folder


def test_a_chat_is_answered_turn_by_turn(brief, tokenizer, tmp_path):
    """Each answer is plain generate's on the chat so far, through its end."""
    target, folder = brief
    prompts = write_rows(tmp_path / "p.jsonl", [{"messages": chat} for chat in CHATS])
    out = tmp_path / "texts.jsonl"
    write("--target", folder, "--dtype", "float32", "--prompts", prompts, "--output", out, "--max-new-tokens", 24)
    rows = read(out)
    assert max(len(row["messages"]) for row in rows) >= 4, "no chat went on"
    for row in rows:
        asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == asked
        assert row["completion_ids"] == greedily(target, asked, 24)
        assert row["messages"][-1]["role"] == "assistant"


def test_turns_of_a_chat_train_as_one_sequence(tokenizer):
    turns = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [4, 0], "temperature": 0.0},
        {"prompt_ids": [1, 2, 3, 4, 0, 5, 6], "completion_ids": [7, 8, 0], "temperature": 0.0},
        {"prompt_ids": [1, 2, 9], "completion_ids": [4, 0], "temperature": 1.0},
    ]
    first, second = prepare_sequences(turns, tokenizer, 64)
    assert first["input_ids"].tolist() == [1, 2, 3, 4, 0, 5, 6, 7, 8, 0]
    assert first["loss_mask"].tolist() == first["target_written"].tolist() == [bool(n) for n in map(int, "0001100111")]
    assert second["input_ids"].tolist() == [1, 2, 9, 4, 0] and not second["target_written"].any()


def test_an_interrupted_call_is_gone_on_from(tmp_path, capsys):
    """A partial last line is removed; what is there is not written again, and the rest is as in one call."""
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    argv = ["--target", "tiny", "--dtype", "float32", "--prompts", prompts, "--max-new-tokens", 8, "--batch-size", 1]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(*argv, "--output", whole)
    write(*argv, "--output", cut, "--num-prompts", 2)
    kept = cut.read_text(encoding="utf-8")
    with cut.open("a", encoding="utf-8") as file:
        file.write('{"id": "x", "mess')
    write(*argv, "--output", cut)
    assert cut.read_text(encoding="utf-8").startswith(kept)
    by_id = {row["id"]: row for row in read(whole)}
    assert {row["id"]: row for row in read(cut)} == by_id and len(read(cut)) == len(by_id)
    capsys.readouterr()
    write(*argv, "--output", cut)
    assert f"{len(PROMPTS)} of {len(PROMPTS)} are written already" in capsys.readouterr().err
    message = fails(capsys, "write", *argv, "--output", cut, "--temperature", 1)
    assert "--output" in message and "temperature = [0.0], and now it is [1.0]" in message


def test_a_prompt_without_room_and_a_chat_that_the_template_refuses_are_dropped(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"

    def answer(requests):
        return [Answer("ab", [7, 0], True) for _ in requests]

    answer.chunk_size, answer.context_length = 4, 10
    rows = [{"prompt": "a b"}, {"prompt": "value " * 40}, {"messages": [{"role": "user", "content": "a"}]}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    conversations, _ = read_conversations(str(path), [0.0])
    file = TextFile(tmp_path / "texts.jsonl", {})
    written = write_texts(conversations, answer, tokenizer, file)
    assert (written.rows, dict(written.dropped), written.tokens) == (1, {"too long": 1, "refused": 1}, 2)
    assert {row["reason"] for row in read(file.dropped_path)} == {"too long", "refused"}


# Self-prompted


def test_the_opening_of_a_users_turn_is_the_templates(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    opening = opening_of_user_turn(tokenizer)
    assert opening.text == "<|pad|>user\n" and tokenizer.decode(opening.token_ids) == opening.text
    assert opening.end_ids == [tokenizer.eos_token_id] and opening.end_text == "<|endoftext|>"


def test_a_target_writes_the_users_turn_and_answers_it(brief, tokenizer, tmp_path):
    target, folder = brief
    out = tmp_path / "texts.jsonl"
    argv = ["--target", folder, "--dtype", "float32", "--self-prompted", 12, "--max-new-tokens", 40, "--output", out]
    write(*argv)
    rows, dropped = read(out), read(out.with_suffix(".dropped.jsonl"))
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    assert rows and {row["id"] for row in rows + dropped} == {f"self-0-{n}" for n in range(12)}
    for row in rows:
        user, answer = row["messages"]
        assert user["role"] == "user" and user["content"].strip() and answer["role"] == "assistant"
        asked = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == asked and row["completion_ids"] == greedily(target, asked, 40)


def test_self_prompting_takes_a_chat_template(tmp_path, capsys):
    argv = ["write", "--target", "tiny", "--self-prompted", 2, "--output", tmp_path / "texts.jsonl"]
    assert "--self-prompted: the target's tokenizer has no chat template" in fails(capsys, *argv)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "Why?"}])
    argv = ["write", "--target", "tiny", "--prompts", prompts, "--chat", "--output", tmp_path / "texts.jsonl"]
    assert "no chat template" in fails(capsys, *argv)


# A server


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the target, one greedy answer a request; the second request is told to wait."""

    def do_GET(self):
        self._reply({"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            if len(server.seen) == 2:
                self.send_error(503)
                return
            if "refuse" in json.dumps(body):
                self.send_error(400)
                return
            tokenizer, target = server.tokenizer, server.target
            if "messages" in body:
                ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
            else:
                ids = tokenizer(body["prompt"])["input_ids"]
            new = greedily(target, ids, body["max_tokens"])
            stopped = new[-1] in target.generation_config.eos_token_id
            text = tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        self._reply({"choices": [{**said, "finish_reason": "stop" if stopped else "length"}]})

    def _reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(brief, tokenizer):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.target, server.tokenizer, server.seen, server.lock = brief[0], tokenizer, [], threading.Lock()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_writes_what_the_target_would(server, brief, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    rows = [{"messages": chat} for chat in CHATS] + [{"messages": [{"role": "user", "content": "refuse"}]}]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    common = ["--target", brief[1], "--prompts", prompts, "--max-new-tokens", 24]
    write(*common, "--server", f"http://127.0.0.1:{server.server_port}", "--output", tmp_path / "a.jsonl")
    write(*common, "--dtype", "float32", "--output", tmp_path / "b.jsonl", "--num-prompts", len(CHATS))
    served, own = ({(row["id"], len(row["messages"])): row for row in read(tmp_path / f"{n}.jsonl")} for n in "ab")
    assert served.keys() == own.keys() and len(served) > len(CHATS)
    for key, row in served.items():
        assert row["messages"] == own[key]["messages"] and row["prompt_ids"] == own[key]["prompt_ids"]
        assert row["retokenized"]
        said = tokenizer(row["messages"][-1]["content"])["input_ids"]
        assert row["completion_ids"] in (said, [*said, tokenizer.eos_token_id])
    paths, keys, bodies = zip(*server.seen, strict=True)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer a-key"}
    assert {body["model"] for body in bodies} == {"served"} and {body["temperature"] for body in bodies} == {0.0}
    assert "a-key" not in "".join(path.read_text() for path in tmp_path.glob("a.*"))
    refused = [
        row["messages"][0]["content"] for row in read(tmp_path / "a.dropped.jsonl") if row["reason"] == "refused"
    ]
    assert refused == ["refuse"]


def test_a_server_is_named_where_it_is_none(tmp_path, capsys, monkeypatch):
    from ppow_hf.serving import text_writers

    monkeypatch.setattr(text_writers, "ATTEMPTS", 1)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    argv = ["write", "--target", "tiny", "--prompts", prompts, "--output", tmp_path / "texts.jsonl", "--server"]
    assert "--server: 'file:///etc' is no address" in fails(capsys, *argv, "file:///etc")
    assert "--server: http://127.0.0.1:9/v1 cannot be reached" in fails(capsys, *argv, "http://127.0.0.1:9")


# Training


def test_a_reduced_vocabulary_is_that_of_what_the_target_writes(brief, tokenizer, tmp_path, monkeypatch):
    """Chat prompts alone, for training and for evaluation: the target writes, and then its tokens are counted."""
    target, folder = brief
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = write_rows(tmp_path / "p.jsonl", [{"messages": chat[:1]} for chat in CHATS])
    argv = ["train", "--target", folder, "--train_data", data, "--eval_data", data, "--use_cpu"]
    argv += ["--max_length", 64, "--max_new_tokens", 16, "--max_steps", 1, "--per_device_train_batch_size", 2]
    argv += ["--draft_vocab_size", 12, "--objective", "supervised", "--output_dir", tmp_path / "out"]
    argv += ["--eval_prompts", 1, "--eval_new_tokens", 4, "--max_window", 2, "--report_to", "none"]
    argv += ["--regenerate", "true", "--target_dtype", "float32"]
    assert cli.main(list(map(str, argv))) == 0
    drafter = PPOWDrafter.from_pretrained(tmp_path / "out")
    counts = torch.zeros(4096)
    for chat in CHATS:
        asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        for token in asked + greedily(target, asked, 16):
            counts[token] += 1
    assert len(drafter.kept_tokens) == 12 and counts[drafter.kept_tokens].min() >= counts[~drafter.t2d].max()


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_evaluation_takes_prompts_alone(brief, tokenizer, make_target, tmp_path, kind):
    """They are decoded whole: the acceptance length is that of the same prompts as sequences without a loss."""
    from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments

    target, _ = brief
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    if kind == "messages":
        rows = [{"messages": chat[:1]} for chat in CHATS]
    drafter = PPOWDrafter.from_pretrained(tiny.drafter_path("tiny-eagle"), dtype=torch.float32)
    args = PPOWTrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], eval_new_tokens=8, max_window=3, max_length=256
    )
    trainer = PPOWTrainer(drafter, target, args, eval_dataset=rows, processing_class=tokenizer)
    expected = [
        tokenizer(row["prompt"])["input_ids"]
        if kind == "prompt"
        else tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        for row in rows
    ]
    assert trainer._eval_prompts(trainer.eval_dataset) == expected
    assert trainer.evaluate()["eval_acceptance_length"] >= 1
    with pytest.raises(ValueError, match="train_dataset: "):
        PPOWTrainer(drafter, target, args, train_dataset=rows, processing_class=tokenizer)


# GGUF


def write_gguf(path, target, tokenizer):
    """A Llama in float32 as llama.cpp lays it out: rotary pairs interleaved, byte-level BPE."""
    gguf = pytest.importorskip("gguf")
    config, writer = target.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in target.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = tensor.view(heads, 2, -1, tensor.shape[1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_target(target, tokenizer, tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, target, tokenizer)
    loaded = loading.load_target(str(path), dtype="float32", device="cpu")
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    assert torch.allclose(loaded(prompt).logits, target(prompt).logits, atol=1e-4)
    assert loading.load_tokenizer(str(path))(PROMPTS[2])["input_ids"] == tokenizer(PROMPTS[2])["input_ids"]
    loaded.to(torch.float64).save_pretrained(tmp_path / "saved")  # a plain model from here on
    assert "--target: there is no file" in fails(
        capsys, "write", "--target", tmp_path / "no.gguf", "--self-prompted", 1, "--output", tmp_path / "t.jsonl"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name:file.gguf", ("owner/name", "file.gguf")),
        ("folder/file.gguf", ("folder", "file.gguf")),
        ("owner/name", ("owner/name", None)),
    ],
)
def test_names_of_gguf_files(name, expected):
    assert loading.split_gguf(name) == expected


def test_a_gguf_file_without_the_package_is_explained(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--target: reading the GGUF file 'a.gguf' takes `pip install gguf`"):
        loading.load_target("a.gguf")
