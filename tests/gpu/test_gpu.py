"""What only an accelerator can show: `pytest -m gpu -n 0 tests/gpu`, a few minutes with the embedded pair, no network.

Warm-up, then checks, then a measurement; the table of them is printed at the end, as far as the run came.
"""

import time
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow_hf import PPOWDrafter, tiny
from ppow_hf.data.sequences import SequenceDataset
from ppow_hf.measure.costs import measure_costs
from ppow_hf.runtime import draft_window
from ppow_hf.runtime.draft_session import now
from ppow_hf.training import PPOWTrainer, PPOWTrainingArguments
from ppow_hf.training.target import FrozenTarget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
TEXT = "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        self."
WAYS = [{"window": "fixed"}, {"window": "kl"}, {"window": "kl", "tree_nodes": 8}]
OBJECTIVES = ["supervised", "ppow", "expected_length"]


@pytest.fixture(scope="module")
def loaded(table):
    """Target, tokenizer and prompt, warm: kernels chosen and memory taken."""
    target = AutoModelForCausalLM.from_pretrained(tiny.target_path(), dtype=torch.float32).to("cuda").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.target_path())
    prompt = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)["input_ids"].to("cuda")
    started = now(target.device)
    target.generate(prompt, max_new_tokens=32, do_sample=False)
    decode(target, prompt, load_drafter("tiny-eagle"), "loop", window="kl")
    table += [("device", torch.cuda.get_device_name()), ("torch", torch.__version__)]
    table.append(("warm-up, s", f"{now(target.device) - started:.2f}"))
    return target, tokenizer, prompt


def load_drafter(name: str) -> PPOWDrafter:
    return PPOWDrafter.from_pretrained(tiny.drafter_path(name), dtype=torch.float32).to("cuda").eval()


def decode(target, prompt, drafter, path, tokens=96, **settings):
    """New ids, trace and seconds of one greedy call."""
    view = drafter.with_settings(**settings)
    options = {"assistant_model": view} if path == "assistant" else {"custom_generate": view.generate_with()}
    started = now(target.device)
    output = target.generate(prompt, max_new_tokens=tokens, do_sample=False, **options)
    seconds = now(target.device) - started
    trace = view.last_trace if path == "assistant" else options["custom_generate"].last_trace
    return output[0, prompt.shape[1] :].tolist(), trace, seconds


# -- checks


@pytest.mark.parametrize("path", ["loop", "assistant"])
@pytest.mark.parametrize(
    "settings", [{"window": "fixed"}, {"window": "kl"}, {"window": "kl", "tree_nodes": 8}], ids=str
)
@pytest.mark.parametrize("name", ["tiny-eagle", "tiny-standalone"])
def test_greedy_text_is_that_of_plain_generate(loaded, table, name, settings, path):
    target, _, prompt = loaded
    if path == "assistant" and "tree_nodes" in settings:
        pytest.skip("trees run in the loop")
    plain = target.generate(prompt, max_new_tokens=96, do_sample=False)[0, prompt.shape[1] :].tolist()
    found, _, _ = decode(target, prompt, load_drafter(name), path, **settings)
    table.append((f"identical in float32: {name} {path} {settings}", found == plain))
    assert found == plain


def waits_of_windows(monkeypatch) -> list[tuple[int, int]]:
    """Waits of the host and draft steps of each window drafted from now on."""
    draft, found = draft_window.draft_windows, []

    def drafted(rows, distributions):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                draft(rows, distributions)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing" in str(warning.message) for warning in caught)
        found.append((waits, max(window.record.draft_steps for window in rows)))

    monkeypatch.setattr(draft_window, "draft_windows", drafted)
    return found


@pytest.mark.parametrize("window", ["fixed", "kl"])
@pytest.mark.parametrize("path", ["loop", "assistant"])
def test_the_host_waits_once_a_token_or_once_a_fixed_window(loaded, table, monkeypatch, path, window):
    target, _, prompt = loaded
    found = waits_of_windows(monkeypatch)
    decode(target, prompt, load_drafter("tiny-eagle"), path, window=window, lookup=False)
    most = max(waits / (1 if window == "fixed" else steps) for waits, steps in found)
    table.append((f"waits a {'window' if window == 'fixed' else 'token'}, at most: {path} {window}", f"{most:.1f}"))
    assert most <= 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_gives_every_parameter_the_gradient_that_float32_gives(loaded, table, tmp_path, objective):
    target, tokenizer, _ = loaded
    ids = torch.tensor(tokenizer(TEXT * 6)["input_ids"][:96])
    data, found = SequenceDataset([ids, ids.flip(0)], [[True] * len(ids)] * 2), {}
    for bf16 in (False, True):
        args = PPOWTrainingArguments(
            output_dir=str(tmp_path), objective=objective, bf16=bf16, per_device_train_batch_size=2, max_length=128,
            max_window=4, cost_ratio=0.1, report_to=[], verify_with="target", text_weighting="visited", seed=1,
        )  # fmt: skip
        trainer = PPOWTrainer(load_drafter("tiny-eagle").train(), target, args, train_dataset=data)
        trainer.model.to("cuda")
        inputs = trainer._prepare_inputs(trainer.data_collator([data[0], data[1]]))
        if objective == "ppow":  # the same windows for both
            if not bf16:
                next_rollout = trainer._next_rollout
                trainer._next_rollout = lambda *given, make=next_rollout: found.setdefault("rollout", make(*given))
            else:
                trainer._next_rollout = lambda *given: found["rollout"]
        trainer.compute_loss(trainer.model, inputs).backward()
        found[bf16] = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    cosines = {
        name: torch.nn.functional.cosine_similarity(gradient.flatten(), found[True][name].flatten(), dim=0).item()
        for name, gradient in found[False].items()
    }
    table.append((f"bf16 against float32, least cosine of a gradient: {objective}", f"{min(cosines.values()):.4f}"))
    assert min(cosines.values()) > 0.9, cosines


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_target_on_two_gpus_gives_the_logits_of_one(loaded, table):
    target, _, prompt = loaded
    sharded = AutoModelForCausalLM.from_pretrained(
        tiny.target_path(), dtype=torch.float32, device_map={"model": 0, "lm_head": 1}
    )
    sources = torch.randn(5, target.config.hidden_size, device="cuda:0")
    torch.testing.assert_close(FrozenTarget(sharded, None).logits(sources), target.lm_head(sources))
    plain = target.generate(prompt, max_new_tokens=48, do_sample=False)[0, prompt.shape[1] :].tolist()
    found, _, _ = decode(sharded, prompt, load_drafter("tiny-eagle"), "loop", tokens=48, window="kl")
    table.append(("identical with the head on a second GPU", found == plain))
    assert found == plain


def test_a_run_trains_on_one_gpu(loaded, table, tmp_path):
    target, tokenizer, _ = loaded
    ids = torch.tensor(tokenizer(TEXT * 6)["input_ids"][:96])
    args = PPOWTrainingArguments(
        output_dir=str(tmp_path), bf16=True, per_device_train_batch_size=2, max_length=128, max_steps=6,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOWTrainer(load_drafter("tiny-eagle"), target, args,
                          train_dataset=SequenceDataset([ids] * 4, [[True] * len(ids)] * 4))  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    table.append(("loss of 6 steps in bf16, first and last", f"{losses[0]:.3f} {losses[-1]:.3f}"))
    assert args.n_gpu == 1 and losses[-1] < losses[0]


# -- measurement


def test_clocks_are_read_when_the_device_has_finished(loaded, table):
    target, _, prompt = loaded
    drafter = load_drafter("tiny-eagle")
    costs = measure_costs(target, drafter, prompt, max_window=5)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    with torch.inference_mode():
        for _ in range(20):
            target(prompt[:, -1:])
    events[1].record()
    now(target.device)
    by_events = events[0].elapsed_time(events[1]) / 20 / 1e3
    table.append(("target forward, ms: measured, by events", f"{1e3 * costs.target_forward_seconds:.2f} "
                  f"{1e3 * by_events:.2f}"))  # fmt: skip
    table.append(("cost ratio", f"{costs.cost_ratio:.3f}"))
    assert costs.target_forward_seconds > 0.5 * by_events
    _, trace, seconds = decode(target, prompt, drafter, "loop", window="fixed", max_window=5)
    accounted = sum(record.draft_seconds + record.verify_seconds for record in trace.rounds)
    table.append(("share of a call's time that its rounds account for", f"{accounted / seconds:.2f}"))
    assert trace.rounds[0].verify_seconds > 0.5 * by_events  # reading the prompt is not free
    assert 0.5 < accounted / seconds <= 1


def test_tokens_per_second(loaded, table):
    target, _, prompt = loaded
    started = time.perf_counter()
    output = target.generate(prompt, max_new_tokens=128, do_sample=False)
    plain = (output.shape[1] - prompt.shape[1]) / (now(target.device) - started)
    table.append(("tokens/s, plain", f"{plain:.0f}"))
    for name in ("tiny-eagle", "tiny-standalone"):
        for window in ("fixed", "kl"):
            new, trace, seconds = decode(target, prompt, load_drafter(name), "loop", 128, window=window)
            speed = len(new) / seconds
            table.append((f"tokens/s, over plain, acceptance length: {name} {window}",
                          f"{speed:.0f} {speed / plain:.2f} {trace.acceptance_length:.2f}"))  # fmt: skip
            assert len(new) == output.shape[1] - prompt.shape[1]
