"""Targets whose embeddings and head are stored as something else than float matrices [V, H]."""

import copy

import pytest
import torch
from torch import nn

from ppow_hf import PPOWDrafter
from ppow_hf.runtime.target_weights import embedding_matrix, head_matrix, target_width

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


class PackedLinear(nn.Linear):
    """Holds its weights as one column of bytes, as 4-bit layers do, and unpacks them in its forward."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.step = plain.weight.abs().max() / 127
        packed = (plain.weight / self.step).round().to(torch.int8).view(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def unpacked(self) -> torch.Tensor:
        return self.weight.view(torch.int8).float().view(self.out_features, self.in_features) * self.step

    def forward(self, x):
        return x @ self.unpacked().T


@pytest.fixture
def packed(make_target):
    target = copy.deepcopy(make_target("llama"))
    target.lm_head = PackedLinear(target.lm_head)
    return target


@pytest.fixture
def dynamic(make_target):
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(copy.deepcopy(make_target("llama")), {nn.Linear}, dtype=torch.qint8)


def test_a_packed_head_is_unpacked(packed):
    """bitsandbytes: the packed weights' shape is not the head's."""
    drafter = PPOWDrafter.from_target(packed, "eagle")
    assert drafter.config.vocab_size == 64 == target_width(packed)
    torch.testing.assert_close(drafter.draft_model.lm_head.weight, packed.lm_head.unpacked())


def test_a_head_whose_weight_is_a_method_is_unpacked(dynamic):
    """PyTorch: a dynamically quantised layer's `weight` is a method."""
    drafter = PPOWDrafter.from_target(dynamic, "eagle")
    assert drafter.config.vocab_size == 64
    wanted = dynamic.lm_head.weight().dequantize()
    torch.testing.assert_close(drafter.draft_model.lm_head.weight, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["eagle", "standalone", "medusa"])
def test_a_packed_target_trains_and_decodes_as_alone(packed, make_trainer, architecture):
    """torchao: quantised targets are drafted for as any other."""
    drafter = PPOWDrafter.from_target(packed, architecture, max_window=3)
    trainer = make_trainer(architecture, "kl", target=packed, drafter=drafter)
    trainer.train()
    plain = packed.generate(PROMPT, do_sample=False, max_new_tokens=12)
    assert torch.equal(packed.generate(PROMPT, do_sample=False, max_new_tokens=12, assistant_model=drafter), plain)


def test_embeddings_that_scale_in_their_forward_are_taken_unscaled(make_target):
    """transformers: Gemma's embeddings multiply by a constant."""

    class Scaled(nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids):
            return nn.functional.embedding(ids, self.weight.float()) * self.embed_scale

    target = copy.deepcopy(make_target("llama"))
    table = target.model.embed_tokens.weight.detach().clone()
    target.model.embed_tokens = Scaled(64, 32)
    target.model.embed_tokens.weight = nn.Parameter(table.to(torch.float8_e4m3fn), requires_grad=False)
    torch.testing.assert_close(embedding_matrix(target), table.to(torch.float8_e4m3fn).float())


def test_a_head_that_cannot_be_read_leaves_the_drafters_own_with_a_warning(packed, caplog):
    """torchao: what a library cannot unpack starts at random, and is said."""

    def refuse(x):
        raise NotImplementedError("no kernel for this device")

    packed.lm_head.forward = refuse
    assert head_matrix(packed) is None
    assert "output head (PackedLinear) could not be read (no kernel for this device)" in caplog.text


def test_a_head_kept_on_disk_is_read_through_its_hook(make_target, make_trainer, tmp_path):
    """accelerate: the weights of offloaded modules are on the meta device until their forward runs."""
    from accelerate import dispatch_model

    whole = make_target("llama", initializer_range=0.3)
    target = copy.deepcopy(whole)
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    target = dispatch_model(
        target, {**places, "lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path / "disk"), force_hooks=True
    )
    assert target.lm_head.weight.is_meta and target.model.embed_tokens.weight.is_meta
    drafter, wanted = (PPOWDrafter.from_target(model, "eagle", max_window=3) for model in (target, whole))
    torch.testing.assert_close(drafter.draft_model.lm_head.weight, wanted.draft_model.lm_head.weight)
    assert drafter.get_input_embeddings() is target.get_input_embeddings()  # shared, wherever its weights are
    trainer = make_trainer("eagle", "kl", target=target, drafter=drafter, evaluate=[{"input_ids": list(range(1, 20))}])
    trainer.train()
    assert trainer.evaluate()["eval_acceptance_length"] >= 1
    plain = whole.generate(PROMPT, do_sample=False, max_new_tokens=12)
    assert torch.equal(target.generate(PROMPT, do_sample=False, max_new_tokens=12, assistant_model=drafter), plain)


def test_a_target_without_numbers_is_refused_by_name(make_target):
    """accelerate: a model made on the meta device was never loaded."""
    with pytest.raises(ValueError, match="target: the weights of its token embeddings are on the meta device"):
        PPOWDrafter.from_target(copy.deepcopy(make_target("llama")).to("meta"), "eagle")
