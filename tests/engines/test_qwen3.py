"""A Qwen3 target, whose heads are wider than its hidden size divided by their number, with a drafter trained here."""

import pytest
from engine_helpers import (
    NEW_TOKENS,
    WINDOW,
    assert_same_acceptance,
    random_prompts,
    random_qwen3,
    run_ours,
    trained_eagle,
)

from ppow_hf.export import export_drafter
from ppow_hf.serving.vllm_runner import run_vllm

pytestmark = pytest.mark.engines


def test_eagle_export_for_qwen3(engine_python, tmp_path):
    qwen3, prompts = random_qwen3(), random_prompts()
    drafter = trained_eagle(qwen3, prompts)
    qwen3.save_pretrained(tmp_path / "target")
    export_drafter(drafter, tmp_path / "drafter", target=qwen3, share_embeddings=False)
    options = {"skip_tokenizer_init": True}
    plain = run_vllm(tmp_path / "target", prompts, NEW_TOKENS, **options)
    speculative = {"method": "eagle3", "model": str(tmp_path / "drafter"), "num_speculative_tokens": WINDOW}
    served = run_vllm(tmp_path / "target", prompts, NEW_TOKENS, speculative, **options)
    ours = run_ours(qwen3, drafter, prompts)
    assert served.outputs == plain.outputs == ours.outputs
    assert_same_acceptance(served, ours)
