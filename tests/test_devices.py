"""What accelerators meet first, as far as a machine without one can show it; the rest is in tests/gpu."""

import copy
import json
import multiprocessing
import runpy
from types import SimpleNamespace

import pytest
import torch
from slow_training import gradients, make_drafter, random_dataset, rollout_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppow_hf import PPOWDrafter
from ppow_hf.publish.hub import repository_files
from ppow_hf.runtime import draft_window
from ppow_hf.runtime.acceptance import exact_dtype
from ppow_hf.studies.configuration import append_result, read_results
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.batch import paired_logits
from ppow_hf.training.checks import check_masks
from ppow_hf.training.target import FrozenTarget

# -- training


def test_of_several_visible_gpus_training_uses_one_and_says_so(tmp_path, make_target, caplog):
    target = make_target("llama")
    args = PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=32, max_steps=1,
                                 per_device_train_batch_size=3, cost_ratio=0.1)  # fmt: skip
    args._n_gpu = 2  # what transformers counts where two are visible to one process
    trainer = PPOWTrainer(make_drafter(target, "eagle"), target, args, train_dataset=random_dataset())
    assert args.n_gpu == 1 and args.train_batch_size == 3
    trainer.train()
    assert isinstance(trainer.model_wrapped, PPOWDrafter)  # no DataParallel around it


@pytest.mark.parametrize("launched", [False, True])
def test_fp16_is_refused_by_name(tmp_path, monkeypatch, launched):
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=("--mixed_precision" if launched else "fp16") + ": .*bf16=True"):
        PPOWTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], fp16=not launched)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_windows_are_not_trained_through_attention_that_takes_no_masks(tmp_path, attention):
    target = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention)))
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        check_masks(target, PPOWTrainingArguments(objective="ppow", **common))
    check_masks(target, PPOWTrainingArguments(objective="supervised", **common))  # reads the text alone


@pytest.mark.parametrize("architecture", ["eagle", "standalone"])
@pytest.mark.parametrize("objective", ["supervised", "ppow", "tv + 0.3*kl", "expected_length"])
def test_bf16_gives_every_parameter_the_gradient_that_float32_gives(make_trainer, architecture, objective):
    found = {}
    for bf16 in (False, True):
        trainer = make_trainer(architecture, objective, bf16=bf16, text_weighting="visited", verify_with="target",
                               proximity_weight=0.0, adaw_start=0.0, seed=3)  # fmt: skip
        if objective == "ppow":  # the same windows for both: drafts of bfloat16 would be others
            inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
            found.setdefault("rollout", rollout_of(trainer, inputs, adaptive=True))
            trainer._next_rollout = lambda *given, rollout=found["rollout"]: rollout
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        trainer.model.train()
        trainer.compute_loss(trainer.model, inputs).backward()
        found[bf16] = gradients(trainer)
    for name, expected in found[False].items():
        close = torch.nn.functional.cosine_similarity(expected.flatten(), found[True][name].flatten(), dim=0)
        assert expected.abs().max() > 0 and close > 0.9, name


def test_a_head_that_lies_on_the_disk_gives_the_logits_of_one_in_memory(make_target, tmp_path):
    target = make_target("llama")
    target.save_pretrained(tmp_path / "target")
    sharded = type(target).from_pretrained(
        tmp_path / "target", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    frozen, sources = FrozenTarget(sharded, None), torch.randn(5, 32)
    kept = torch.tensor([1, 5, 40])
    torch.testing.assert_close(frozen.logits(sources), target.lm_head(sources))
    torch.testing.assert_close(frozen.logits(sources, kept), target.lm_head(sources)[:, kept])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_logits_of_the_draft_vocabulary_are_those_of_the_whole(make_target, family):
    target = copy.deepcopy(make_target(family))
    drafter = make_drafter(target, "eagle", draft_vocab_size=16)
    frozen, sources, draft = FrozenTarget(target, None), torch.randn(7, 32), torch.randn(7, 16)
    for _ in range(2):  # another vocabulary is not taken for the first
        found = paired_logits(drafter, frozen, draft, sources)
        torch.testing.assert_close(found[1], frozen.logits(sources)[:, drafter.kept_tokens], atol=1e-6, rtol=1e-6)
        drafter.set_draft_vocabulary(torch.arange(3, 51, 3))
    whole = make_drafter(target, "eagle")
    assert torch.equal(paired_logits(whole, frozen, draft, sources)[1], frozen.logits(sources)[:, :16])


# -- decoding


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator, a CPU being the stand-in: values that come to the host, and
    operations whose shape or check hangs on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "multinomial", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0
        self._lists = Lists(self)

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list | tuple) else ())
        )
        self.count += name in self.WAITING or by_mask
        return operation(*arguments, **(options or {}))


class Lists(TorchFunctionMode):
    """`tolist` and `cpu`, which no operation of a CPU shows."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.waits.count += getattr(function, "__name__", "") in ("tolist", "cpu", "numpy")
        return function(*arguments, **(options or {}))


def test_what_waits_is_counted():
    numbers = torch.tensor([3.0, 1.0, 2.0])
    with Waits() as waits:
        numbers.tolist(), numbers.sum().item(), bool(numbers.any()), int(numbers[0]), numbers[numbers > 1]
        torch.multinomial(numbers, 1), numbers.nonzero(), numbers + 1, numbers.argmax()
    assert waits.count == 7


@pytest.fixture
def counted(monkeypatch):
    """Waits while windows are drafted, and windows: `[[waits, draft steps of the window's longest row], ...]`."""
    windows = []

    draft = draft_window.draft_windows

    def drafted(rows, distributions):
        with Waits() as waits:
            draft(rows, distributions)
        windows.append([waits.count, max(window.record.draft_steps for window in rows)])

    monkeypatch.setattr(draft_window, "draft_windows", drafted)
    return windows


@pytest.mark.parametrize(("path", "do_sample"), [("loop", False), ("loop", True), ("batch", False), ("batch", True),
                                                 ("assistant", False)])  # fmt: skip
@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa"])
def test_the_host_waits_once_a_token_or_once_a_fixed_window(make_target, counted, architecture, path, do_sample):
    target = make_target("llama", initializer_range=0.3)
    drafter = make_drafter(target, architecture, **({} if architecture != "medusa" else {"max_window": 6})).eval()
    prompt = torch.arange(1, 9)[None].repeat(3 if path == "batch" else 1, 1)
    for window in ("fixed", "heuristic", "kl"):
        counted.clear()
        view = drafter.with_settings(window=window, max_window=6, cost_ratio=0.01, lookup=False)
        options = {"assistant_model": view} if path == "assistant" else {"custom_generate": view.generate_with()}
        target.generate(prompt, max_new_tokens=24, do_sample=do_sample, temperature=0.5 if do_sample else None,
                        top_k=0 if do_sample else None, **options)  # fmt: skip
        assert counted and max(steps for _, steps in counted) > 1
        for waits, steps in counted:
            assert waits == (steps if window == "kl" else 1)


def test_a_round_of_one_text_waits_four_times(make_target):
    target = make_target("llama", initializer_range=0.3)
    drafter = make_drafter(target, "eagle").eval()
    prompt = torch.arange(1, 9)[None]
    waits = {}
    for tokens in (24, 72):
        decoding = drafter.generate_with(window="fixed", max_window=4)
        with Waits() as counted:
            target.generate(prompt, max_new_tokens=tokens, do_sample=False, custom_generate=decoding)
        waits[tokens] = counted.count, len(decoding.last_trace.rounds)
    (few, few_rounds), (many, many_rounds) = waits.values()
    assert many - few == 4 * (many_rounds - few_rounds)  # window, verdict, the support of P and Q, divergences


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("path", ["loop", "assistant"])
def test_a_fixed_window_that_is_read_at_its_end_stops_at_an_end_of_text(make_target, path, do_sample):
    target = make_target("llama", vocab_size=12, hidden_size=16, num_layers=2, initializer_range=0.4)
    drafter = PPOWDrafter.from_target(target, "standalone", num_hidden_layers=2).eval()
    drafter.draft_model.model.load_state_dict(target.state_dict())
    prompt, eos = torch.tensor([[3, 1, 4]]), [5, 7]
    view = drafter.with_settings(window="fixed", max_window=8)
    options = {"assistant_model": view} if path == "assistant" else {"custom_generate": view.generate_with()}
    torch.manual_seed(0)
    output = target.generate(
        prompt, max_new_tokens=60, do_sample=do_sample, eos_token_id=eos, pad_token_id=0, **options
    )
    if not do_sample:
        plain = target.generate(prompt, max_new_tokens=60, do_sample=False, eos_token_id=eos, pad_token_id=0)
        assert output.tolist() == plain.tolist()
    new = output[0, 3:].tolist()
    assert not set(new[:-1]) & set(eos)
    for record in view.last_trace.rounds if path == "assistant" else options["custom_generate"].last_trace.rounds:
        assert not set(record.draft_ids[:-1]) & set(eos)
        assert len(record.draft_ids) == record.window == len(record.features)


def test_drawing_without_a_wait_is_what_multinomial_draws():
    probs = torch.randn(4, 50).softmax(-1)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.multinomial(probs, 1)
        torch.manual_seed(seed)
        assert torch.equal(draft_window.draw_tokens(probs.log()), expected)


def test_random_numbers_are_float64_wherever_a_device_has_it():
    assert exact_dtype(torch.device("mps")) == torch.float32
    assert exact_dtype(torch.device("cpu")) == exact_dtype(torch.device("cuda")) == torch.float64


# -- files that others change


def append_many(path, name):
    for number in range(50):
        append_result(path, {"name": name, "number": number, "padding": "x" * 3000})


def test_processes_that_append_to_one_results_file_lose_no_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": "whole"}\n{"name": "cut')
    workers = [multiprocessing.get_context("fork").Process(target=append_many, args=(path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    before = 0
    while any(worker.is_alive() for worker in workers):
        before = max(before, len(read_results(path)))  # reading meanwhile takes nothing away
    for worker in workers:
        worker.join()
    lines = read_results(path)
    assert len(lines) == 101 >= before and lines[0] == {"name": "whole"}
    assert sorted((line["name"], line["number"]) for line in lines[1:]) == [(n, i) for n in "ab" for i in range(50)]


def test_published_code_runs_as_it_was_pushed_or_not_at_all(tmp_path, make_target, monkeypatch):
    make_drafter(make_target("llama"), "eagle").save_pretrained(tmp_path / "drafter")
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    for name, content in repository_files(tmp_path / "drafter", "user/name").items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    asked = []

    def cached_file(repository, name, revision=None, **options):
        asked.append((repository, revision))
        return str(snapshot / name)

    script = runpy.run_path(str(snapshot / "custom_generate" / "generate.py"))
    pinned_commit = script["pinned_commit"]
    monkeypatch.setitem(pinned_commit.__globals__, "cached_file", cached_file)
    assert pinned_commit() == "a" * 40
    assert asked[0] == ("user/name", "main") and set(asked[1:]) == {("user/name", "a" * 40)}  # all of one commit
    config = json.loads((snapshot / "config.json").read_text())
    changed = {**config, "auto_map": {"AutoModel": "somebody/else--modeling.Drafter"}}
    (snapshot / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="code of another repository.*revision="):
        pinned_commit()
    (snapshot / "windowing.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="windowing.py of user/name is not the one that was pushed.*revision="):
        pinned_commit()
