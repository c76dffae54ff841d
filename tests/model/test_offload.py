"""What checkpointed layers are fed goes away and comes back, the same and in time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import inlay
from inlay.core.errors import UserError
from inlay.model import checkpointing
from inlay.model.offload import FUNCTION, Offload, offloaded, require_offload
from inlay.train.settings import TrainConfig
from inlay.train.setup import training_mode
from tests.methods.bases import build, llama, randomize

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))
LAYERS = 4


class Notes:
    """Copies in memory that note what is done, and let go of what was sent."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.given: list[weakref.ref[Tensor]] = []

    def send(self, tensor: Tensor) -> tuple[int, Tensor]:
        self.given.append(weakref.ref(tensor.untyped_storage()))
        number = len(self.given) - 1
        self.done.append(f"send {number}")
        return number, tensor.clone()

    def fetch(self, sent: tuple[int, Tensor]) -> tuple[int, Tensor]:
        self.done.append(f"fetch {sent[0]}")
        return sent[0], sent[1].clone()

    def arrive(self, coming: tuple[int, Tensor]) -> Tensor:
        self.done.append(f"arrive {coming[0]}")
        return coming[1]


def checkpointed():
    model = inlay.get_peft_model(
        build(lambda: llama(num_hidden_layers=LAYERS)), inlay.LoraConfig(r=2, lora_dropout=0.3)
    )
    randomize(model, 0.3)
    checkpointing.enable(model)
    return model.train()


def gradients(model) -> list[Tensor]:
    torch.manual_seed(3)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return found


def test_gradients_are_the_same_bits_and_each_input_is_on_its_way_while_the_next_is_used():
    model, notes = checkpointed(), Notes()
    plain = gradients(model)
    before = [getattr(m, FUNCTION, None) for m in model.modules()]
    with offloaded(model, Offload(notes, least=1)):
        found = gradients(model)
    assert len(found) == len(plain) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert notes.done == [
        *(f"send {i}" for i in range(LAYERS)),
        *("fetch 3", "fetch 2", "arrive 3"),
        *("fetch 1", "arrive 2", "fetch 0", "arrive 1", "arrive 0"),
    ]
    assert [getattr(m, FUNCTION, None) for m in model.modules()] == before


def test_what_was_sent_is_not_kept_on_the_device_too():
    model, notes = checkpointed(), Notes()
    with offloaded(model, Offload(notes, least=1)):
        out = model(input_ids=IDS, use_cache=False).logits
        gc.collect()
        assert all(kept() is None for kept in notes.given)
        out.sum().backward()
    assert len(notes.given) == LAYERS, "nothing else was sent, also in the layers' second pass"


def test_only_floating_point_tensors_of_some_size_go():
    notes = Notes()
    offload = Offload(notes, least=4096)
    for tensor in (torch.ones(1023), torch.ones(1024, dtype=torch.int64)):
        assert offload.pack(tensor) is tensor
        assert offload.unpack(tensor) is tensor
    assert not notes.done
    strided = torch.arange(2048.0).view(2, 1024).t()
    assert torch.equal(offload.unpack(offload.pack(strided)), strided)


def test_asked_for_again_a_tensor_is_brought_again_and_what_is_gone_is_not():
    notes = Notes()
    offload = Offload(notes, least=1)
    first, second = (offload.pack(torch.ones(3) * i) for i in range(2))
    del first
    for _ in range(2):
        assert torch.equal(offload.unpack(second), torch.ones(3))
    assert notes.done == ["send 0", "send 1", *("fetch 1", "arrive 1") * 2]


def test_on_the_cpu_there_is_nothing_to_move():
    model = build(llama)
    config = TrainConfig(gradient_checkpointing=True, offload_activations=True)
    config.validate()
    with (
        pytest.raises(UserError, match=r"the model is on 'cpu'.*offload_activations: false"),
        training_mode(model, config),
    ):
        pass
    assert not model.is_activation_checkpointing
    require_offload(torch.device("cuda"))


def test_without_checkpoints_it_is_refused():
    with pytest.raises(UserError, match=r"set train\.gradient_checkpointing: true"):
        TrainConfig(offload_activations=True).validate()


def test_a_model_that_checkpoints_in_a_way_of_its_own_says_so():
    with (
        pytest.raises(UserError, match="Linear checkpoints in a way of its own"),
        offloaded(torch.nn.Linear(1, 1), Offload(Notes())),
    ):
        pass
