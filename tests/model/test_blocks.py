"""Norms and gated MLPs are told by what they compute; their fast forms give the same gradients."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import inlay
from inlay.kernels import elementwise
from inlay.model.accelerate import accelerated
from inlay.model.blocks import fast_blocks
from tests.methods.bases import SMALL, bert, build, gpt2, llama, randomize, t5

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
BLOCKS = {
    # what is fast in two layers: an MLP and the norms of each, and the last norm
    "Llama": 7,
    "Mistral": 7,
    "Qwen2": 7,
    "Qwen3": 11,  # norms of queries and keys too
    "Gemma2": 11,  # four norms a layer
    "Gemma3": 15,  # both
    "Phi3": 7,  # gate and up are one linear
}


def decoder(name: str) -> Any:
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(
        **SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0
    )
    return build(lambda: getattr(transformers, f"{name}ForCausalLM")(config))


def run(model: Any) -> Any:
    more = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def results(model: Any) -> list[torch.Tensor]:
    """Return the logits, and the gradient of every trained parameter."""
    torch.manual_seed(7)
    out = run(model)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return [out.detach(), *grads]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def once(model: Any) -> Any:
    @torch.no_grad()
    def quietly() -> None:
        training = model.training
        run(model.eval())
        model.train(training)

    return quietly


def compare(model: Any) -> list[nn.Module]:
    """Return the blocks that were fast, having computed the same as without."""
    model.train()
    plain = results(model)
    with fast_blocks(model, once(model)) as taken:
        fast = results(model)
    assert len(plain) == len(fast) > 1
    for one, two in zip(plain, fast, strict=True):
        assert float((one - two).norm()) < 1e-3 * float(one.norm())
    assert not any("forward" in vars(module) for module in model.modules())
    return taken


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of(name: str) -> None:
    model = inlay.get_peft_model(
        decoder(name), inlay.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    )
    randomize(model, 0.3)
    assert len(compare(model)) == BLOCKS[name]


@pytest.mark.parametrize("make", [gpt2, bert])
def test_models_without_such_blocks_are_left_alone(make: Any) -> None:
    model = inlay.get_peft_model(build(make), inlay.LoraConfig(r=2))
    randomize(model, 0.3)
    assert compare(model) == []


def test_an_encoder_and_decoder() -> None:
    model = inlay.get_peft_model(build(t5), inlay.LoraConfig(r=2))
    randomize(model, 0.3)
    assert all("norm" in type(module).__name__.lower() for module in compare(model))


def test_blocks_that_train_are_left_alone() -> None:
    model = inlay.get_peft_model(
        build(llama), inlay.LNTuningConfig(target_modules=["input_layernorm"])
    )
    taken = compare(model)
    names = [name for name, module in model.named_modules() if module in taken]
    assert names
    assert not any("input_layernorm" in name for name in names)


class Almost(nn.Module):
    """Has all parts of a norm, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4), requires_grad=False), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


def test_what_computes_otherwise_is_not_taken_for_one() -> None:
    block = Almost()
    with torch.no_grad(), fast_blocks(block, lambda: block(torch.randn(3, 4))) as taken:
        assert taken == []


def test_what_is_never_called_is_not_taken() -> None:
    with fast_blocks(build(llama), lambda: None) as taken:
        assert taken == []


def test_an_error_puts_everything_back() -> None:
    model = build(llama).requires_grad_(False)
    with pytest.raises(ZeroDivisionError), fast_blocks(model, once(model)):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float32 as the plain blocks are."""
    model = inlay.get_peft_model(build(llama), inlay.LoraConfig(r=2))
    randomize(model, 0.3)
    exact = results(model)[0]
    model.get_base_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(model)[0]
        with fast_blocks(model, once(model)) as taken:
            assert len(taken) == 7
            fast = results(model)[0]
            monkeypatch.setattr(elementwise, "available", lambda: False)
            eager = results(model)[0]
    wrong = float((plain - exact).norm())
    assert float((fast - exact).norm()) < 1.3 * wrong
    assert float((eager - exact).norm()) < 1.3 * wrong


def kept(model: Any) -> int:
    """Return the numbers that a forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run(model)
    del out
    return sum(found.values())


def test_what_can_be_made_again_is_not_kept() -> None:
    """Of a gated MLP: its two inner tensors, and not their product; of a norm, its input alone."""
    config = inlay.LoraConfig(r=1, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = inlay.get_peft_model(build(llama), config)
    plain = kept(model)
    quiet = once(model)
    with accelerated(model, quiet), fast_blocks(model, quiet):
        fast = kept(model)
    layers, tokens = 2, IDS.numel()
    inner = SMALL["intermediate_size"]
    # silu's output and the product, and the norm's quotient and product, less x A^T and the like
    assert plain - fast > layers * tokens * (2 * inner)


def test_checkpointing_keeps_nothing_of_a_block() -> None:
    """What a node would make its input of is let go, too, and made again."""
    config = inlay.LoraConfig(r=1, target_modules="all-linear")
    model = inlay.get_peft_model(build(llama), config).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    quiet = once(model)
    inner = (*IDS.shape, SMALL["intermediate_size"])

    def held() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return sum(tensor.shape == inner for tensor in found)

    with accelerated(model, quiet), fast_blocks(model, quiet):
        before = held()
        out = run(model)
        assert held() == before
        out.sum().backward()
