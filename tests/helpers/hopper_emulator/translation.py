"""attention.cu as C++: inline PTX becomes calls of device.h, which declares the rest of CUDA that the source uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICE = Path(__file__).with_name("device.h")

# What each instruction is in device.h, and the constraints of its operands. Any other is an error: it has to be written first.
INSTRUCTIONS: dict[str, tuple[str, str]] = {
    "mbarrier.init.shared::cta.b64 [%0], %1;": ("mbarrier_init", "r r"),
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": ("mbarrier_arrive_expect", "r r"),
    "mbarrier.arrive.shared::cta.b64 _, [%0];": ("mbarrier_arrive", "r"),
    "{ .reg .pred holds; setp.ne.u32 holds, %1, 0; @holds mbarrier.arrive.shared::cta.b64 _, [%0]; }": (
        "mbarrier_arrive_if",
        "r r",
    ),
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }": (
        "mbarrier_wait",
        "r r",
    ),
    "bar.sync %0, %1;": ("bar_sync", "r r"),
    "bar.arrive %0, %1;": ("bar_arrive", "r r"),
    "{ .reg .pred holds; setp.ne.u32 holds, %0, 0; @holds st.volatile.shared.u32 [%3], %4; @holds bar.arrive %1, %2; }": (
        "store_and_bar_arrive_if",
        "r r r r r",
    ),
    "ld.volatile.shared.u32 %0, [%1];": ("load_shared", "=r r"),
    "ld.shared.b32 %0, [%1];": ("load_shared", "=r r"),
    "ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];": ("load_shared_4", "=r =r =r =r r"),
    "st.volatile.shared.u32 [%0], %1;": ("store_shared", "r r"),
    "st.shared.b32 [%0], %1;": ("store_shared", "r r"),
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];": (
        "load_box",
        "r l r r r",
    ),
    "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;": ("bulk_store", "l r r"),
    "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;": ("bulk_commit_and_wait", ""),
    "ld.global.s32 %0, [%1];": ("load_global", "=r l"),
    "{ .reg .pred holds; setp.ne.u32 holds, %2, 0; @holds ld.global.u32 %0, [%1]; }": (
        "load_global_if",
        "+r l r",
    ),
    "prefetch.global.L1 [%0];": ("nothing", "l"),
    "ex2.approx.ftz.f32 %0, %1;": ("ex2", "=f f"),
    "rcp.approx.ftz.f32 %0, %1;": ("rcp", "=f f"),
    "wgmma.fence.sync.aligned;": ("wgmma_fence", ""),
    "wgmma.commit_group.sync.aligned;": ("wgmma_commit", ""),
    "wgmma.wait_group.sync.aligned %0;": ("wgmma_wait", "n"),
    "prmt.b32 %0, %1, %2, %3;": ("prmt", "=r r r r"),
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": ("cvt_e4m3x2", "=h f f"),
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
    "mov.b32 %0, {low, high}; }": ("cvt_e4m3x4", "=r f f f f"),
    "cvt.rn.bf16x2.f32 %0, %1, %2;": ("cvt_bf16x2", "=r f f"),
    "cvt.rn.f16x2.f32 %0, %1, %2;": ("cvt_f16x2", "=r f f"),
    "mov.b32 %0, {%1, %2};": ("pack", "=r h h"),
    "add.rn.f16x2 %0, %1, %2;": ("add_f16x2", "=r r r"),
    "xor.b32 %0, %1, %2;": ("exclusive_or", "=r r r"),
    "griddepcontrol.wait;": ("nothing", ""),
    "fence.proxy.async;": ("nothing", ""),
    "fence.proxy.async.shared::cta;": ("nothing", ""),
    "setmaxnreg.dec.sync.aligned.u32 24;": ("nothing", ""),
    "setmaxnreg.inc.sync.aligned.u32 %0;": ("nothing", "n"),
    # What holds the compiler's hands.
    "": ("nothing", "*"),
}

_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|\basm\b|[()\[\]{}]|::?|,', re.S)
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+) ")
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?unsigned char (\w+)\[\];")
_BYTES = {"s8": 1, "u8": 1, "e4m3": 1, "bf16": 2, "f16": 2}


class UnknownInstruction(Exception):
    """attention.cu has inline PTX, or a form of it, that the emulator does not know."""


@dataclass(frozen=True)
class Statement:
    """An `asm` statement: its template, with single spaces, and its operands in order, each a constraint and an expression."""

    template: str
    operands: tuple[tuple[str, str], ...]


def translate(source: str, kernels: Sequence[str]) -> str:
    """The C++ of `source`, and a function `run_NAME` for each of these kernels. Lines stay where they are.

    Raises UnknownInstruction, which names the template.
    """
    parts, end = [], 0
    for start, stop in _statements(source):
        text = source[start:stop]
        parts += [source[end:start], _call(_parse(text)), "\n" * text.count("\n")]
        end = stop
    text = "".join([*parts, source[end:]])
    text = _DYNAMIC.sub(r"unsigned char* const \1 = emulator::dynamic_shared;", text)
    if "extern __shared__" in text:
        raise UnknownInstruction("extern __shared__")
    return text + "".join(
        f'\nextern "C" __attribute__((visibility("default"))) const char* run_{name}(void** arguments, unsigned x, unsigned y, int threads, unsigned shared_bytes, '
        f"unsigned long long seed) {{ return emulator::launch({name}, arguments, {{x, y}}, threads, shared_bytes, seed); }}\n"
        for name in kernels
    )


def _statements(source: str) -> Iterator[tuple[int, int]]:
    """Where each asm statement begins and ends, without its semicolon."""
    start, depth = None, 0
    for token in _TOKEN.finditer(source):
        if token[0] == "asm":
            start, depth = token.start(), 0
        elif start is not None and token[0] in "()":
            depth += 1 if token[0] == "(" else -1
            if depth == 0:
                yield start, token.end()
                start = None


def _parse(text: str) -> Statement:
    sections, operands = _sections(text[text.index("(") + 1 : -1])
    template = "".join(
        string.encode().decode("unicode_escape") for string in re.findall(r'"((?:\\.|[^"\\])*)"', sections)
    )
    return Statement(" ".join(template.split()), operands)


def _sections(body: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The strings in front, and the operands of the first two sections; clobbered are memory and nothing."""
    sections: list[list[str]] = [[]]
    last = depth = 0
    for token in _TOKEN.finditer(body):
        kind = token[0]
        if kind in "([{":
            depth += 1
        elif kind in ")]}":
            depth -= 1
        elif depth == 0 and kind in (":", "::", ","):
            sections[-1].append(body[last : token.start()].strip())
            last = token.end()
            sections += [[] for _ in range(0 if kind == "," else len(kind))]
    sections[-1].append(body[last:].strip())
    template, *others = sections
    if len(others) == 3 and others[2] != ['"memory"'] or len(others) > 3 or len(template) != 1:
        raise UnknownInstruction(body)
    operands = []
    for operand in (text for section in others[:2] for text in section if text):
        found = re.fullmatch(r'"(\S+)"\s*\((.*)\)', operand, re.S)
        if found is None:
            raise UnknownInstruction(operand)
        operands.append((found[1], found[2]))
    return template[0], tuple(operands)


def _call(statement: Statement) -> str:
    if "wgmma.mma_async" in statement.template:
        return _product(statement)
    try:
        name, constraints = INSTRUCTIONS[statement.template]
    except KeyError:
        raise UnknownInstruction(statement.template) from None
    found = " ".join(constraint for constraint, _ in statement.operands)
    if constraints != "*" and found != constraints:
        raise UnknownInstruction(f"{statement.template} with operands {found}")
    return f"emulator::{name}({', '.join(expression for _, expression in statement.operands)})"


def _product(statement: Statement) -> str:
    """wgmma.mma_async as wgmma.py writes it, with d in the first registers of an array."""
    found = _WGMMA.search(statement.template)
    if found is None:
        raise UnknownInstruction(statement.template)
    n, k, accumulator, a_type, b_type = int(found[1]), int(found[2]), *found.groups()[2:]
    count, words = n // 2, 4 if f"%{n // 2 + 4}, p" in statement.template else 0
    b = count + (words or 1)
    tail = "" if accumulator == "s32" else ", 1, 1"
    tail += "" if k == 32 else ", 0" if words else ", 0, 0"
    numbers = [f"%{i}" for i in range(b)]
    a = "{" + ", ".join(numbers[count:]) + "}" if words else numbers[count]
    expected = (
        f"{{ .reg .pred p; setp.ne.b32 p, %{b + 1}, 0; {found[0]}"
        f"{{{', '.join(numbers[:count])}}}, {a}, %{b}, p{tail}; }}"
    )
    constraints = [constraint for constraint, _ in statement.operands]
    known = [*["r"] * words, *["l"] * (not words), "l", "r"]
    d = [expression for _, expression in statement.operands[:count]]
    expressions = [expression for _, expression in statement.operands[count:]]
    if (
        statement.template != expected
        or k * _BYTES[a_type] != 32
        or _BYTES[a_type] != _BYTES[b_type]
        or set(constraints[:count]) > {"+r", "+f"}
        or constraints[count:] != known
        or d != [f"d[{i}]" for i in range(count)]
        or (words and expressions[:4] != [f"a[{i}]" for i in range(4)])
    ):
        raise UnknownInstruction(f"{statement.template} with operands {statement.operands}")
    a_of = "&a[0], 0" if words else f"nullptr, {expressions[0]}"
    types = f"emulator::Type::{a_type}, emulator::Type::{b_type}"
    return f"emulator::wgmma<{n}, {types}>(&d[0], {a_of}, {expressions[-2]}, {expressions[-1]})"
