"""`inlay quantize`: a folder in 4 bits, written whole or not at all, that trains and merges."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from inlay import UserError
from inlay.bases._packed import PackedTensor
from inlay.bases.nf4 import PackedLinear
from inlay.model.load import embedded, load_base
from inlay.run import agreement
from tests.cli.conftest import SMALL
from tests.model.test_quantized_experts import tiny as tiny_mixture

IDS = torch.arange(3, 23)[None]


def test_the_folder_is_the_base_packed_as_it_was_loaded(inlay):
    code, out, _ = inlay("quantize", "inlay-tiny", "packed", "--device", "cpu")
    assert code == 0
    assert out.startswith("packed: LlamaForCausalLM, 35 layers of 2,027,520 values in nf4, 493,632")
    assert sum(p.stat().st_size for p in Path("packed").iterdir()) < 3.4e6
    there, tokenizer = load_base("packed", device="cpu")
    here, _ = load_base(quantize="nf4", device="cpu")
    assert torch.equal(there(IDS).logits, here(IDS).logits)
    assert tokenizer.chat_template
    assert not [path for path in Path().iterdir() if path.name.endswith(".partial")]


def test_it_tells_one_json_object(inlay):
    words = ["--kind", "fp4", "--dtype", "bfloat16", "--device", "cpu", "--json"]
    code, out, _ = inlay("quantize", embedded(), "packed", *words)
    told = json.loads(out)
    assert (code, told["event"], told["kind"], told["layers"]) == (0, "quantized", "fp4", 35)
    model, _ = load_base("packed")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {m.kind for m in model.modules() if isinstance(m, PackedLinear)} == {"fp4"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inlay-tiny", "full"], "full exists already"),
        (["inlay-tiny", "full/file"], "full/file exists already"),
        (["inlay-tiny", "out", "--kind", "nf5"], "'nf5' is not one of nf4, fp4, int8"),
        (["./nope", "out"], "no such folder"),
        (["packed", "out", "--kind", "fp4"], "quantized already, as nf4"),
    ],
)
def test_what_cannot_be_written_is_one_error_and_leaves_nothing(inlay, words, told):
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    if words[0] == "packed":
        assert inlay("quantize", "inlay-tiny", "packed")[0] == 0
    code, _, errors = inlay("quantize", *words)
    assert (code, told in errors) == (2, True), errors
    assert not Path("out").exists()
    assert Path("full/file").read_text() == "mine"


def test_a_full_disk_is_known_before_anything_is_written(inlay, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 << 20))
    code, _, errors = inlay("quantize", "inlay-tiny", "deep/packed")
    assert code == 2
    assert "the packed model takes 3 MiB, and its disk has 2 free" in errors
    assert not Path("deep").exists()


def test_a_disk_that_fills_up_while_it_is_written_leaves_nothing(inlay, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    code, _, errors = inlay("quantize", "inlay-tiny", "deep/packed")
    assert code != 0
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    assert not [path for path in Path().rglob("*") if "packed" in path.name]


def test_a_packed_base_trains_and_its_run_merges_into_a_plain_folder(inlay):
    assert inlay("quantize", "inlay-tiny", "packed")[0] == 0
    for words in (["--base_model", "packed"], ["--quantize", "nf4"]):
        run = f"runs/{words[-1]}"
        code, _, errors = inlay(
            "train", "--data", "chats.jsonl", "--output_dir", run, *words, *SMALL
        )
        assert code == 0, errors
        code, out, errors = inlay("merge", run, f"merged-{words[-1]}")
        assert code == 0, errors
        assert re.match(
            r"(100\.0|99\.\d)% of \d+ tokens of 3 rows as before the merge, mean KL", out
        )
        merged, _ = load_base(f"merged-{words[-1]}", device="cpu")
        assert not [m for m in merged.modules() if isinstance(m, PackedLinear)]
        assert not hasattr(merged.config, "quantization_config")
        assert inlay("eval", run)[0] == 0


def test_a_mixture_is_packed_trains_at_its_experts_and_merges(inlay):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded())
    tokenizer.save_pretrained(tiny_mixture(Path("mixture"), vocab_size=len(tokenizer)))
    code, out, errors = inlay("quantize", "mixture", "packed", "--device", "cpu")
    assert code == 0, errors
    experts, others = 2 * 4 * (128 * 64 + 64 * 64), 2 * (2 * 64 * 64 + 2 * 32 * 64)
    assert f"10 layers of {experts + others:,} values in nf4" in out
    words = ["--base_model", "packed", "--adapter.target_parameters", '["experts.down_proj"]']
    words += ["--data", "chats.jsonl", "--output_dir", "run", *SMALL]
    code, _, errors = inlay("train", *words)
    assert code == 0, errors
    code, _, errors = inlay("merge", "run", "merged")
    assert code == 0, errors
    merged, _ = load_base("merged", device="cpu")
    assert not any(isinstance(module, PackedTensor) for module in merged.modules())


def test_a_merge_that_changes_what_is_said_is_refused_before_anything_is_written(
    inlay, monkeypatch
):
    words = ["--quantize", "nf4", "--output_dir", "run", *SMALL]
    assert inlay("train", "--data", "chats.jsonl", *words)[0] == 0
    real = agreement.says

    def other(model, rows):
        return [p.roll(1, -1) if hasattr(model, "roster") else p for p in real(model, rows)]

    monkeypatch.setattr(agreement, "says", other)
    code, _, errors = inlay("merge", "run", "merged")
    assert code == 2
    assert "says 0.0% of" in errors
    assert "at least 95% must agree" in errors
    assert not Path("merged").exists()
    assert inlay("merge", "run", "merged", "--min_agreement", "0")[0] == 0


def test_a_merge_without_rows_says_so(inlay):
    words = ["--quantize", "nf4", "--output_dir", "run", *SMALL]
    assert inlay("train", "--data", "chats.jsonl", *words)[0] == 0
    Path("chats.jsonl").unlink()
    code, out, _ = inlay("merge", "run", "merged")
    assert code == 0
    assert out.startswith("not compared before and after: ")
    assert inlay("merge", "run/adapter", "other")[0] == 0


def test_agreement_is_counted_by_token():
    one = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
    other = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.8, 0.1]]).log()
    found = agreement.compare([one, one], [other, one])
    assert (found.rows, found.tokens, found.top1) == (2, 4, 0.75)
    assert found.kl == pytest.approx(0.5 * math.log(3.5) / 4, rel=1e-5)
    found.require(0.75)
    with pytest.raises(UserError, match=r"75.0% of 4 tokens of 2 rows"):
        found.require(0.76)
