"""Small random programs with attention in them, each the text of a module, from a seed: what the pass may meet.

    python tests/helpers/random_programs.py --seeds 0 20000      # run them; 1 where there is a difference
    python tests/helpers/random_programs.py --show 17            # the text of one

A program has `inputs(step)`, the inputs of the call number `step`, whose sizes differ from call to call where they may;
`program(*inputs)`; and SETTINGS. It is made of parts: where query, key and value lie in memory, a mask, a spelling of
attention, and a chain of views, copies and writes behind it. Parts that do not fit together are found by running the program
eagerly, and it is made anew. `program_check.py` runs and compares.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

HEAD = "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import arange, ones, zeros\n"
# How sizes are told: by the graph alone, by symbols (three ways to ask for them), or by the data.
SIZES = (*["static"] * 6, "dynamic", "automatic", "marked", "unbacked")


@dataclass
class Draft:
    """A program that is being made: lines of `inputs` and of `program`, and what they hold."""

    rng: random.Random
    settings: dict[str, Any]
    arguments: list[str] = field(default_factory=list)
    making: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def one_of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def given(self, name: str, value: str) -> None:
        """An argument of the program."""
        self.arguments.append(name)
        self.making.append(f"{name} = {value}")

    def text(self, steps: list[tuple[int, int, int]]) -> str:
        arguments = ", ".join(self.arguments)
        made = "".join(f"    {line}\n" for line in self.making)
        body = "".join(f"    {line}\n" for line in self.body)
        return (
            f"{HEAD}\nSETTINGS = {self.settings!r}\n\n\n"
            f"def inputs(step):\n    b, n, m = {steps!r}[step]\n{made}    return ({arguments},)\n\n\n"
            f"def program({arguments}):\n{body}"
        )


def random_program(seed: int) -> str:
    """The text of the program of `seed`."""
    rng = random.Random(seed)
    while True:
        text = _draft(rng, seed)
        if text is not None and _runs(text):
            return text


def _runs(text: str) -> bool:
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            for step in range(namespace["SETTINGS"]["calls"]):
                torch.manual_seed(step)
                outputs = namespace["program"](*namespace["inputs"](step))
                if not all(bool(output.isfinite().all()) for output in outputs):
                    return False
    except (RuntimeError, IndexError):
        return False
    return True


def _draft(rng: random.Random, seed: int) -> str | None:
    sizes = rng.choice(SIZES)
    dtype = rng.choice(("float32", "float32", "bfloat16", "float16"))
    autocast = rng.choice((None, None, "bfloat16"))
    wants_grad = rng.random() < 0.2 and sizes in ("static", "dynamic")
    settings = {
        "sizes": sizes,
        "dtype": dtype,
        "autocast": autocast,
        "grad": wants_grad,
        "training": wants_grad and rng.random() < 0.8,
        "precision": rng.choice(("accurate", "accurate", "balanced", "fast")),
        "calls": 1 if sizes in ("static", "unbacked") else 3 if sizes == "automatic" else 2,
    }
    draft = Draft(rng, settings)
    rank = rng.choice((4, 4, 4, 4, 3, 2, 5))
    by_hand = rng.random() < 0.5
    heads = rng.choice((1, 2, 4))
    kv_heads = rng.choice([number for number in (1, 2, 4) if heads % number == 0]) if rank == 4 else heads
    head_dim, value_dim = rng.choice((8, 16)), rng.choice((8, 16))
    square = rng.random() < 0.6
    steps = []
    for _ in range(settings["calls"]):
        n = rng.choice((2, 5, 8, 17, 33))
        m = n if square else rng.choice((3, 6, 16, 31))
        steps.append((rng.choice((1, 2, 3)), n, m))
    if settings["calls"] > 1:  # sizes of 1 are sizes of their own, and so are lengths that are equal
        steps = [
            (rng.choice((2, 3, 4)), n + step, (n if square else m) + step)
            for step, (_, n, m) in enumerate(steps)
        ]
    draft.making += [f"torch.manual_seed({seed} + step)", f"dtype = torch.{dtype}"]
    attends = _Attention(draft, rank, heads, kv_heads, head_dim, value_dim, square)
    if not attends.place() or not (attends.by_hand() if by_hand else attends.sdpa()):
        return None
    _chain(draft, rank)
    return draft.text(steps)


@dataclass
class _Attention:
    """The parts of one attention, written into a draft."""

    draft: Draft
    rank: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    square: bool
    selected: str | None = None
    """What the data select where only they tell sizes: the batch, "b", or the tokens, "n"."""

    def place(self) -> bool:
        """Query, key and value, `[batch, heads, length, dim]` or of another rank, in random layouts."""
        draft = self.draft
        if draft.settings["sizes"] == "unbacked":
            self.selected = draft.one_of("b", "n") if self.square and self.rank in (3, 4) else "b"
            if self.rank == 2:
                return False
            draft.given("keep", f"torch.arange({self.selected}) % 3 != 1")
            draft.body.append("rows = keep.nonzero().squeeze(1)")
        alike = self.value_dim == self.head_dim and self.kv_heads == self.heads and self.square
        if self.rank == 4 and alike and draft.maybe(0.25):
            return self._packed()
        first = draft.one_of(*self._layouts())
        for name, heads, length, dim in (
            ("q", self.heads, "n", self.head_dim),
            ("k", self.kv_heads, "m", self.head_dim),
            ("v", self.kv_heads, "m", self.value_dim),
        ):
            layout = first if draft.maybe(0.6) else draft.one_of(*self._layouts())
            self._one(name, heads, length, dim, layout)
        return True

    def _packed(self) -> bool:
        """One tensor of all three, as one projection makes it."""
        draft, heads, dim = self.draft, self.heads, self.head_dim
        if self.selected == "n":
            draft.given("x", f"torch.randn(n, b, {3 * heads * dim}, dtype=dtype)")
        else:
            draft.given("x", f"torch.randn(b, n, {3 * heads * dim}, dtype=dtype)")
        if self.selected:
            draft.body.append("x = x[rows]")
        swap = "permute(1, 2, 0, 3)" if self.selected == "n" else "transpose(1, 2)"
        sizes = "x.shape[0], x.shape[1]"
        split, view = draft.one_of(
            ("x.chunk(3, -1)", f".view({sizes}, {heads}, {dim})"),
            (f"x.view({sizes}, 3, {heads}, {dim}).unbind(2)", ""),
            (f"x.split({heads * dim}, -1)", f".reshape({sizes}, {heads}, {dim})"),
            ("x.chunk(3, dim=2)", f".unflatten(-1, ({heads}, -1))"),
        )
        draft.body.append(f"q, k, v = {split}")
        draft.body += [f"{name} = {name}{view}.{swap}" for name in "qkv"]
        return True

    def _layouts(self) -> tuple[str, ...]:
        if self.selected == "n":
            return ("snbh", "snbh_flat") if self.rank == 4 else ("snb",)
        if self.rank == 4:
            every = ("hnd", "nhd", "nhd_flat", "dims", "sliced", "narrow", "strided")
            return every if self.selected else (*every, "snbh", "snbh_flat", "heads", "batch", "hbnd", "one")
        return (
            ("hnd", "dims", "sliced") if self.selected or self.rank != 3 else ("hnd", "dims", "sliced", "snb")
        )

    def _one(self, name: str, heads: int, length: str, dim: int, layout: str) -> None:
        """`name` as its layout has it, viewed inside the program or before it."""
        shapes = {
            "hnd": ((*self._outer(heads), length, dim), ""),
            "nhd": (("b", length, heads, dim), ".transpose(1, 2)"),
            "nhd_flat": (("b", length, heads * dim), f".unflatten(-1, ({heads}, {dim})).transpose(1, 2)"),
            "dims": ((*self._outer(heads), dim, length), ".transpose(-1, -2)"),
            "sliced": ((*self._outer(heads), f"{length} + 3", dim), "[..., 1:-2, :]"),
            "narrow": (("b", heads, length, dim + 4), f"[..., :{dim}]"),
            "strided": (("b", heads, length, 2 * dim), "[..., ::2]"),
            "snbh": ((length, "b", heads, dim), ".permute(1, 2, 0, 3)"),
            "snbh_flat": (
                (length, "b", heads * dim),
                f".unflatten(-1, ({heads}, {dim})).transpose(0, 1).transpose(1, 2)",
            ),
            "snb": ((length, "b", dim), ".transpose(0, 1)"),
            "heads": (("b", 1, length, dim), f".expand(-1, {heads}, -1, -1)"),
            "batch": ((1, heads, length, dim), ".expand(b, -1, -1, -1)"),
            "one": ((1, 1, length, dim), f".expand(b, {heads}, -1, -1)"),
            "hbnd": ((heads, "b", length, dim), ".transpose(0, 1)"),
        }
        shape, view = shapes[layout]
        made = f"torch.randn({', '.join(map(str, shape))}, dtype=dtype)"
        inside = self.selected is not None or (layout not in ("batch", "one") and self.draft.maybe(0.6))
        self.draft.given(name, made if inside else made + view)
        if self.selected:
            self.draft.body.append(f"{name} = {name}[rows]")
        if inside and view:
            self.draft.body.append(f"{name} = {name}{view}")

    def _outer(self, heads: int) -> tuple[Any, ...]:
        return {2: (), 3: ("b",), 4: ("b", heads), 5: ("b", 2, heads)}[self.rank]

    def repeated(self) -> bool:
        """Key and value heads repeated to those of the queries."""
        if self.kv_heads == self.heads:
            return False
        times = self.heads // self.kv_heads
        repeat = self.draft.one_of(
            f"repeat_interleave({times}, 1)",
            f"repeat_interleave({times}, dim=1)",
            f"unsqueeze(2).expand(-1, -1, {times}, -1, -1).flatten(1, 2)",
        )
        self.draft.body.append(f"k, v = k.{repeat}, v.{repeat}")
        return True

    def mask(self) -> str | None:
        """A bool mask, True: attend, in which each query sees the first key: an argument, or made in the program."""
        draft = self.draft
        tokens = self.selected == "n"
        made = []
        if draft.maybe(0.5):
            diagonal = draft.one_of("", ", device=q.device")
            made.append(
                draft.one_of(
                    f"ones(q.shape[-2], k.shape[-2], dtype=torch.bool{diagonal}).tril()",
                    "arange(q.shape[-2])[:, None] >= arange(k.shape[-2])",
                    "(arange(k.shape[-2]) - arange(q.shape[-2])[:, None]).abs() <= 3 + arange(q.shape[-2])[:, None]",
                )
            )
        if (not made or draft.maybe(0.5)) and not tokens:
            shapes = {2: ("n, m", "1, m"), 3: ("n, m", "b, 1, m", "b, n, m", "1, n, m"),
                      4: ("n, m", "b, 1, n, m", "b, 1, 1, m", f"b, {self.heads}, n, m", f"1, {self.heads}, n, m", "b, m", "1, 1, 1, m"),
                      5: ("n, m", "b, 1, 1, n, m", f"b, 2, {self.heads}, n, m", "b, 1, 1, 1, m", f"{self.heads}, n, m")}[self.rank]  # fmt: skip
            shape = draft.one_of(*shapes)
            first = "(torch.rand({0}) < 0.6).index_fill_(-1, torch.tensor(0), True)"
            draft.given("mask", first.format(shape))
            if self.selected == "b" and shape.startswith("b"):
                draft.body.append("mask = mask[rows]")
            expression = "mask"
            if shape == "b, m":
                expression = draft.one_of(
                    "mask[:, None, None, :]", "mask[:, None, None]", "mask.unsqueeze(1).unsqueeze(2)"
                )
                if draft.maybe(0.3):
                    expression += ".expand(-1, -1, q.shape[-2], -1)"
            made.append(expression)
        if not made:
            return None
        draft.body.append(f"allowed = {' & '.join(f'({part})' for part in made)}")
        return "allowed"

    def bias(self) -> str | None:
        """What is added to scores: numbers, or 0 and a number that hides."""
        draft = self.draft
        if draft.maybe(0.5) and self.selected != "n":
            shape = (
                draft.one_of("n, m", "1, 1, n, m", f"1, {self.heads}, n, m", f"{self.heads}, n, m")
                if self.rank == 4
                else "n, m"
            )
            draft.given(
                "bias", f"torch.randn({shape}, dtype={draft.one_of('dtype', 'dtype', 'torch.float32')})"
            )
            return "bias"
        allowed = self.mask()
        if allowed is None:
            return None
        dtype = draft.one_of("q.dtype", "q.dtype", "torch.float32")
        known = f"torch.{draft.settings['dtype']}" if dtype == "q.dtype" else dtype
        low = draft.one_of("-math.inf", f"torch.finfo({known}).min", "-1e4" if "q." in dtype else "-1e9")
        draft.body.append(
            draft.one_of(
                f"bias = zeros({allowed}.shape, dtype={dtype}).masked_fill(~{allowed}, {low})",
                f"bias = torch.where({allowed}, 0.0, {low}).to({dtype})",
                f"bias = torch.zeros_like({allowed}, dtype={dtype}).masked_fill({allowed}.logical_not(), {low})",
                f"bias = (1.0 - {allowed}.to({dtype})) * {'-1e4' if low == '-math.inf' else low}",
            )
        )
        return "bias"

    def sdpa(self) -> bool:
        draft = self.draft
        options = []
        grouped = self.kv_heads != self.heads
        if grouped and draft.maybe(0.5):
            self.repeated()
        elif grouped:
            options.append("enable_gqa=True")
        kind = draft.one_of("none", "none", "causal", "bool", "bool", "additive")
        if kind == "causal":
            options.append("is_causal=True")
        elif kind == "bool" and (allowed := self.mask()) is not None:
            options.append(f"attn_mask={allowed}")
        elif kind == "additive" and (bias := self.bias()) is not None:
            options.append(f"attn_mask={bias}")
        if draft.maybe(0.3):
            options.append(f"scale={draft.one_of('0.2', '0.35', 'q.shape[-1] ** -0.5')}")
        call = draft.one_of(
            "F.scaled_dot_product_attention", "torch.nn.functional.scaled_dot_product_attention"
        )
        draft.body.append(f"y = {call}({', '.join(['q', 'k', 'v', *options])})")
        return True

    def by_hand(self) -> bool:
        draft, rank = self.draft, self.rank
        self.repeated()
        scale = draft.one_of("0.25", "0.2", f"1 / math.sqrt({self.head_dim})", "q.shape[-1] ** -0.5")
        letters = {3: ("bqd,bkd->bqk", "bqk,bkd->bqd"), 4: ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"), 5: ("bghqd,bghkd->bghqk", "bghqk,bghkd->bghqd"), 2: ("qd,kd->qk", "qk,kd->qd")}[rank]  # fmt: skip
        left, right = "q", "k"
        before = draft.one_of("q", "both", "after", "after", "divided")
        if before == "q":
            left = f"(q * ({scale}))"
        elif before == "both":
            left, right = f"(q * ({scale}) ** 0.5)", f"(k * ({scale}) ** 0.5)"
        spellings = [
            f"{left} @ {right}.transpose(-2, -1)",
            f"{left} @ {right}.mT",
            f"torch.matmul({left}, {right}.transpose(-1, -2))",
            f'torch.einsum("{letters[0]}", {left}, {right})',
        ]
        if rank == 3:
            spellings += [f"torch.bmm({left}, {right}.transpose(1, 2))"] * 2
        draft.body.append(f"s = {draft.one_of(*spellings)}")
        if before == "after":
            draft.body.append(f"s = s * ({scale})")
        elif before == "divided":
            draft.body.append(f"s = s / math.sqrt({self.head_dim})")
        kind = draft.one_of("none", "none", "hidden", "hidden", "bias")
        if kind == "hidden" and (allowed := self.mask()) is not None:
            low = draft.one_of(
                "-math.inf",
                "-1e4",
                f"torch.finfo(torch.{draft.settings['autocast'] or draft.settings['dtype']}).min",
            )
            draft.body.append(
                draft.one_of(
                    f"s = s.masked_fill(~{allowed}, {low})",
                    f"s = s.masked_fill({allowed} == 0, {low})",
                    f"s = torch.where({allowed}, s, {low})",
                    f"s = torch.where({allowed}, s, torch.tensor({low}, dtype=s.dtype))",
                    f"s.masked_fill_({allowed}.logical_not(), {low})",
                )
            )
        elif kind == "bias" and (bias := self.bias()) is not None:
            draft.body.append(draft.one_of(f"s = s + {bias}", f"s = {bias} + s", f"s = s.add({bias})"))
        draft.body.append(
            draft.one_of(
                "w = s.softmax(-1)",
                "w = F.softmax(s, dim=-1)",
                "w = torch.softmax(s, dim=-1)",
                "w = F.softmax(s, dim=-1, dtype=torch.float32)",
                "w = s.float().softmax(-1)",
                "w = (s - s.amax(-1, keepdim=True)).exp()\n    w = w / w.sum(-1, keepdim=True)",
            )
        )
        if draft.maybe(0.2):
            draft.body.append("w = F.dropout(w, 0.1, False)")
        cast = draft.one_of("w.to(v.dtype)", "w.type_as(v)")
        products = [f"{cast} @ v", f"torch.matmul({cast}, v)", f'torch.einsum("{letters[1]}", {cast}, v)']
        if rank == 3:
            products.append(f"torch.bmm({cast}, v)")
        draft.body.append(f"y = {draft.one_of(*products)}")
        return True


def _chain(draft: Draft, rank: int) -> None:
    """Views, copies and writes behind the attention, and what is returned."""
    swap = "1, 2" if rank >= 4 else "0, 1"
    to_tokens = {
        4: ("transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)", "transpose(1, 2).flatten(2)", "transpose(1, 2).contiguous()",
            "transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], -1)", "permute(2, 0, 1, 3).flatten(2)",
            "permute(0, 2, 1, 3).reshape(y.shape[0], -1)", "permute(2, 0, 1, 3).contiguous()", "transpose(1, 2).flatten(0, 1)",
            "permute(2, 0, 1, 3).reshape(y.shape[2] * y.shape[0], -1)", "transpose(1, 2).clone()"),
        3: ("transpose(0, 1)", "transpose(0, 1).flatten(1)", "transpose(0, 1).reshape(y.shape[1], -1)"),
        2: ("t()",),
        5: ("transpose(2, 3).flatten(3)", "flatten(1, 2)", "permute(0, 3, 1, 2, 4).flatten(2)", "transpose(1, 2)"),
    }[rank]  # fmt: skip
    returned = ["y"]
    if draft.maybe(0.75):
        draft.body.append(f"y = y.{draft.one_of(*to_tokens)}")
    for _ in range(draft.rng.choice((0, 0, 1, 1, 2, 3))):
        writes = () if draft.settings["grad"] else ("y = y.mul_(2)", "y.add_(1)", "y[..., 0] = 0.5")
        step = draft.one_of(
            "y = y * 2", "y = y + 1", "y = y.contiguous()", "y = y.clone()", "y = y.transpose(0, 1)",
            "y = y.transpose(-1, -2)", f"y = y.transpose({swap})", "y = y.flatten(0, 1)", "y = y.flatten(-2)",
            "y = y.reshape(-1, y.shape[-1])", "y = y.view(y.shape[0], -1)", "y = y.unsqueeze(0)", "y = y[..., ::2]",
            "y = y.chunk(2, -1)[1]", "y = torch.cat([y, y], -1)", "y = torch.cat([y, y.flip(0)], 0)", "y = y[:, 1:]",
            "y = y.unflatten(-1, (2, -1))", "y = y.mT", "z = y.transpose(0, -1)", "z = y.flatten(1)", "z = y.square().sum(0)",
            "z = y.transpose(1, 2).reshape(y.shape[0], -1)", "y = y.squeeze()", "y = y.movedim(0, -1)", *writes,
        )  # fmt: skip
        draft.body.append(step)
        if step.startswith("z") and "z" not in returned:
            returned.append("z")
    draft.body.append(f"return ({', '.join(returned)},)")


def main() -> int:
    from program_check import check

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "END"), default=(0, 200))
    parser.add_argument("--show", type=int, metavar="SEED")
    parser.add_argument("--way", help="take this way for all programs")
    options = parser.parse_args()
    if options.show is not None:
        print(random_program(options.show))
        return 0
    began, seen, failures = time.time(), Counter[str](), 0
    for seed in range(*options.seeds):
        outcome = check(seed, options.way)
        seen.update(outcome.counted)
        if outcome.difference:
            failures += 1
            print(f"== seed {seed}, {outcome.way}: {outcome.difference}\n{outcome.text}", flush=True)
    counts = ", ".join(f"{name} {number}" for name, number in sorted(seen.items()))
    print(f"{failures} differences; {counts}; {time.time() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
