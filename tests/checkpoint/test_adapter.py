"""An adapter's folder: whole or not at all, strict, of one base, and trusted in nothing."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay import LoraConfig, PeftModel, UserError, get_peft_model
from inlay.checkpoint import folder as files
from inlay.checkpoint.adapter import describe
from inlay.core.inlaid import Inlaid
from inlay.model.load import load_tokenizer

IDS = torch.arange(3, 13)[None]
TARGETS = ["q_proj", "v_proj"]
TENSORS = "adapter_model.safetensors"


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes})


@pytest.fixture
def saved(tiny_llama: Any, tmp_path: Path) -> Path:
    """Return the folder of a random adapter of `tiny_llama()`."""
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / TENSORS)
    (folder / "inlay.json").unlink()


def refused(model: Any, folder: Path, match: str) -> None:
    """Check that loading is one error, and that it leaves the model as it was."""
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=match):
        PeftModel.from_pretrained(model, folder)
    assert not any(isinstance(module, Inlaid) for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags


# -- there and back


def test_an_adapter_comes_back_as_it_was_saved(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config()).eval()
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert again.get_nb_trainable_parameters()[0] == 0
    again.save_pretrained(tmp_path / "b")
    for name in (TENSORS, "adapter_config.json", "inlay.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_is_trainable_gives_the_loaded_adapter_gradients(tiny_llama: Any, saved: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), saved, is_trainable=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)


def test_named_adapters_are_saved_in_folders_of_their_names(tiny_llama: Any, tmp_path) -> None:
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("legal", config(r=2))
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / TENSORS).is_file()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    again.load_adapter(tmp_path / "both" / "legal", "legal")
    assert again.active_adapters == ["default"]
    for name in ("default", "legal"):
        model.set_adapter(name)
        again.set_adapter(name)
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_saving_while_merged_writes_the_base_and_the_adapter_as_they_are(
    tiny_llama: Any, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), config(target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for name in (TENSORS, "inlay.json"):
        before, merged = (tmp_path / part / name for part in ("before", "merged"))
        assert before.read_bytes() == merged.read_bytes()


def test_what_else_is_in_a_folder_stays_when_an_adapter_is_saved_there(
    tiny_llama: Any, saved: Path
) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "README.md").write_text("my card")
    get_peft_model(tiny_llama(), config(r=2)).save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "README.md").read_text() == "my card"
    assert describe(saved)["config"]["r"] == 2


def test_the_tokenizer_and_the_template_are_written_beside(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), config())
    model.save_pretrained(tmp_path / "a", tokenizer=tiny_tokenizer, chat_template="{{ messages }}")
    again = load_tokenizer(tmp_path / "a")
    assert again.chat_template == "{{ messages }}"
    assert tiny_tokenizer.chat_template != "{{ messages }}"


def test_describe_reads_no_tensor(saved: Path) -> None:
    told = describe(saved)
    assert (told["method"], told["tensors"], told["parameters"]) == ("lora", 8, 2 * 4 * (64 + 48))
    assert told["base"]["architecture"] == "llama"


def test_a_resized_vocabulary_goes_with_the_adapter(tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base, _ = inlay.load_base(tmp_path / "base")
    base.resize_token_embeddings(330)
    model = get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = model(IDS).logits

    fresh, _ = inlay.load_base(tmp_path / "base")
    refused(fresh, tmp_path / "adapter", r"trained with 330 tokens.*resize_token_embeddings\(330\)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        fresh.resize_token_embeddings(330)
    with pytest.warns(UserWarning, match="replaces the base's own embedding"):
        again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=0)


# -- the base


def test_an_adapter_of_another_base_of_the_same_shape_is_refused_unless_told_otherwise(
    tiny_llama: Any, saved: Path
) -> None:
    refused(tiny_llama(seed=1), saved, r"belongs to another base: .*weights differ.*check_base")
    other = PeftModel.from_pretrained(tiny_llama(seed=1), saved, check_base=False)
    assert other.active_adapters == ["default"]


def test_a_base_with_another_configuration_is_another_base(tiny_llama: Any, saved: Path) -> None:
    other = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    refused(other, saved, "belongs to another base: the configurations differ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_base(
    tiny_llama: Any, saved: Path, dtype: torch.dtype
) -> None:
    model = PeftModel.from_pretrained(tiny_llama().to(dtype), saved)
    assert torch.isfinite(model(IDS).logits).all()


def test_a_second_adapter_is_checked_against_the_base_and_not_what_is_set_into_it(
    tiny_llama: Any, saved: Path
) -> None:
    model = get_peft_model(tiny_llama(), config(target_modules="all-linear"))
    model.load_adapter(saved, "second")
    other = get_peft_model(tiny_llama(seed=1), config(target_modules="all-linear"))
    with pytest.raises(UserError, match="belongs to another base"):
        other.load_adapter(saved, "second")
    assert list(other.peft_config) == ["default"]


# -- strictness


def test_one_error_lists_every_missing_unexpected_and_misshaped_tensor(
    tiny_llama: Any, saved: Path
) -> None:
    tensors = load_file(saved / TENSORS)
    first, second, third, *_ = sorted(tensors)
    tensors["base_model.model.stray"] = tensors.pop(first)
    tensors[second] = tensors[second][:, :-1].contiguous()
    replace_tensors(saved, tensors)
    with pytest.raises(UserError) as caught:
        PeftModel.from_pretrained(tiny_llama(), saved)
    said = str(caught.value)
    assert f"1 missing: {first}" in said
    assert "1 unexpected: base_model.model.stray" in said
    assert f"1 misshaped: {second} is [32, 3], not [32, 4]" in said
    assert third not in said


def test_an_adapter_of_other_modules_is_refused(tiny_llama: Any, saved: Path) -> None:
    rewrite(saved, target_modules=["q_proj", "k_proj"])
    refused(tiny_llama(), saved, "4 missing: .*k_proj.*4 unexpected: .*v_proj")


def test_a_state_dict_is_taken_whole_or_not_at_all(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama(), config())
    before = {k: t.clone() for k, t in inlay.get_peft_model_state_dict(model).items()}
    other = {k: torch.zeros_like(t) for k, t in before.items()}
    other.popitem()
    with pytest.raises(UserError, match="1 missing"):
        inlay.set_peft_model_state_dict(model, other)
    after = inlay.get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


# -- what is no adapter, or a hostile one


@pytest.mark.parametrize("cut", [0, 4, 100, -5])
def test_truncated_tensors_are_refused(tiny_llama: Any, saved: Path, cut: int) -> None:
    path = saved / TENSORS
    path.write_bytes(path.read_bytes()[:cut])
    refused(tiny_llama(), saved, "no whole safetensors file|cut or changed")
    (saved / "inlay.json").unlink()
    refused(tiny_llama(), saved, "no whole safetensors file")


def test_one_flipped_bit_is_found(tiny_llama: Any, saved: Path) -> None:
    content = bytearray((saved / TENSORS).read_bytes())
    content[-9] ^= 1
    (saved / TENSORS).write_bytes(bytes(content))
    refused(tiny_llama(), saved, "cut or changed since")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(tiny_llama: Any, saved: Path, value) -> None:
    tensors = load_file(saved / TENSORS)
    name = min(tensors)
    tensors[name][0, 0] = value
    replace_tensors(saved, tensors)
    refused(tiny_llama(), saved, f"NaN or infinite, in {name}")


def test_a_header_as_long_as_a_pickle_begins_is_opened(tiny_llama: Any, saved: Path) -> None:
    content = (saved / TENSORS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    # the two bytes that a pickle begins with, as the length of a header: the next such one
    longer = (size - 0x0380 + 0xFFFF) // 0x10000 * 0x10000 + 0x0380
    header, data = content[8 : 8 + size].ljust(longer), content[8 + size :]
    (saved / TENSORS).write_bytes(longer.to_bytes(8, "little") + header + data)
    assert (saved / TENSORS).read_bytes()[:2] == b"\x80\x03"
    (saved / "inlay.json").unlink()
    inlay.PeftModel.from_pretrained(tiny_llama(), saved)


def test_a_pickle_is_not_opened(tiny_llama: Any, saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return (trap.touch, ())

    content = pickle.dumps({"lora_A": Trap()})
    (saved / TENSORS).write_bytes(content)
    refused(tiny_llama(), saved, "is a pickle|cut or changed")
    (saved / TENSORS).unlink()
    (saved / "adapter_model.bin").write_bytes(content)
    refused(tiny_llama(), saved, r"is a pickle.*safe_serialization=True")
    assert not trap.exists()


BROKEN = {
    "[1]": "holds a JSON list",
    '{"peft_type": "LORA"': r"adapter_config\.json:1: this is no JSON",
    "{}": "has no peft_type",
    '{"peft_type": "LORRA"}': "unknown method 'LORRA'.*Did you mean 'lora'",
    '{"peft_type": "LORA", "r": "many"}': "r='many' does not fit",
    '{"peft_type": "LORA", "r": -1}': "r=-1 must be a whole number",
    '{"peft_type": "LORA", "lora_alpha": [1]}': r"lora_alpha=\[1\] does not fit",
    '{"peft_type": "LORA", "target_modules": {"a": 1}}': "target_modules={'a': 1}",
    '{"peft_type": "LORA", "use_telepathy": true}': "use_telepathy=True, which this version",
    '{"peft_type": "LORA", "velora_config": {"r": 1}}': "velora_config=.* is not supported",
    '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}": "cannot be read|is missing|no peft_type",
    " " * (5 << 20): "are the limit",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_broken_settings_are_one_error_that_names_the_file(
    tiny_llama: Any, saved: Path, text: str
) -> None:
    (saved / "adapter_config.json").write_text(text)
    refused(tiny_llama(), saved, BROKEN[text])


# a tenth of a second a module path, whatever way the engine goes about it
SLOW = r"(?:[\w.]|\w\w|\w\w\w|[a-z]{4})+(?<![a-z])"


def test_a_field_unknown_but_unset_is_no_obstacle(tiny_llama: Any, saved: Path) -> None:
    rewrite(saved, use_telepathy=False, telepathy_config=None, runtime_config={"a": 1})
    assert PeftModel.from_pretrained(tiny_llama(), saved).active_adapters == ["default"]


@pytest.mark.parametrize("rank", [10**6, 10**12, 10**18, 10**30])
def test_a_rank_bomb_takes_no_memory(tiny_llama: Any, saved: Path, rank: int) -> None:
    rewrite(saved, r=rank)
    refused(tiny_llama(), saved, "misshaped|whole number from 1 to|no layer can hold|does not fit")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(a+)+$|" * 50 + "(.*a){40}b"},
        {"target_modules": r"(\w+\.?)*proj!"},
        {"rank_pattern": {rf"{SLOW}|{i}": 2 for i in range(200)}},
        {"target_modules": [f"name{i}" for i in range(150_000)]},
        {"exclude_modules": SLOW},
    ],
    ids=["alternatives", "nested", "many patterns", "many names", "exclusion"],
)
@pytest.mark.timeout(30)
def test_a_pattern_bomb_is_refused(tiny_llama: Any, saved: Path, changes: Any) -> None:
    rewrite(saved, **changes)
    refused(tiny_llama(), saved, "more than|over the limit|matches no module")


def test_a_tensor_file_that_claims_more_than_it_holds_is_refused(tiny_llama, saved) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    content = len(header).to_bytes(8, "little") + header.encode()
    (saved / TENSORS).write_bytes(content)
    (saved / "inlay.json").unlink()
    refused(tiny_llama(), saved, "no whole safetensors file")


def test_a_folder_without_an_adapter_says_what_is_in_it(tiny_llama: Any, saved: Path) -> None:
    refused(tiny_llama(), saved.parent, "no adapter; it has the adapters adapter in it")
    refused(tiny_llama(), saved / TENSORS, "is a file")
    refused(tiny_llama(), saved.parent / "a" / "b" / "c", "there is no folder")
    refused(tiny_llama(), Path("someone/something"), "is no folder here, and the hub")


@pytest.mark.parametrize("written", ["null", '{"weights": {"samples": 3}}', '{"architecture": 1}'])
def test_a_fingerprint_that_cannot_be_read_is_an_error(tiny_llama, saved, written) -> None:
    ours = json.loads((saved / "inlay.json").read_text())
    (saved / "inlay.json").write_text(json.dumps({**ours, "base": json.loads(written)}))
    refused(tiny_llama(), saved, "fingerprint of the base cannot be read")


# -- writing


def test_no_space_leaves_nothing_of_a_new_folder_and_all_of_an_old_one(
    tiny_llama: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(tiny_llama(), config(r=2))
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(self: Path, *_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    monkeypatch.undo()
    monkeypatch.setattr(files, "write_bytes", lambda *_: full(saved))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_full_fine_tuning_has_no_adapter_to_save(tiny_llama: Any, tmp_path: Path) -> None:
    from inlay.methods.full import FullConfig

    model = get_peft_model(tiny_llama(), FullConfig())
    with pytest.raises(UserError, match="trains the base itself"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
