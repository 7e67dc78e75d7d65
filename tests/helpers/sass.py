"""What the disassembly of a compiled kernel says of its loops and of registers that wgmma reads while it runs."""

from __future__ import annotations

import os
import re
import subprocess
from collections import deque
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

_PREDICATE = r"(?:@!?U?P\d+\s+)?"
_PRODUCT = re.compile(r"GMMA\S+ R\d+, R(\d+), gdesc")  # A in four registers, from R..
_WRITES_NOTHING = r"(?!ST|RED|BAR|SYNCS|BRA|EXIT|R2UR|ISETP|FSETP|VOTE|PLOP|BSSY|BSYNC)"
_WRITE = re.compile(rf"{_PREDICATE}{_WRITES_NOTHING}(\S+) R(\d+)\b")
_WAIT = "DEPBAR.LE gsb0, 0x0"


class Code:
    """Instructions in order, and which can follow which."""

    def __init__(self, lines: list[tuple[int, str]]) -> None:
        self.lines = [line for _, line in lines]
        self._index = {address: i for i, (address, _) in enumerate(lines)}

    def successors(self, i: int) -> list[int]:
        line = self.lines[i]
        conditional = line.startswith("@")
        if re.match(rf"{_PREDICATE}EXIT", line):
            return [i + 1] if conditional else []
        if target := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line):
            after = self._index[int(target[1], 16)]
            both = conditional or re.search(r"BRA\S* !?U?P\d", line)
            return [after, i + 1] if both else [after]
        return [i + 1] if i + 1 < len(self.lines) else []

    def main_loop(self) -> list[str]:
        """The shortest way from the end of a PV product back to itself past exponentials: the iteration that nothing special
        happens in. (Where blocks are left out ptxas may share code of both iterations; what is not past them is none.)"""
        ends = [i for i, line in enumerate(self.lines) if _PRODUCT.search(line) and "gsb0" in line]
        exponentials = {i for i, line in enumerate(self.lines) if "MUFU.EX2" in line}
        return min(filter(None, (self._shortest_cycle(end, past=exponentials) for end in ends)), key=len)

    def loop_past(self, instruction: str) -> list[str]:
        """The shortest way from the end of a PV product back to itself past `instruction`; [] where there is none."""
        ends = [i for i, line in enumerate(self.lines) if _PRODUCT.search(line) and "gsb0" in line]
        wanted = {i for i, line in enumerate(self.lines) if re.search(rf"\b{instruction}\b", line)}
        return min(
            filter(None, (self._shortest_cycle(end, past=wanted) for end in ends)), key=len, default=[]
        )

    def loop_without_product(self) -> list[str]:
        """The shortest way from the end of the scores' product back to itself without a PV product: the iteration in which a
        block is left out."""
        products = {i for i, line in enumerate(self.lines) if _PRODUCT.search(line)}
        ends = [
            i for i, line in enumerate(self.lines) if "GMMA" in line and "gsb0" in line and i not in products
        ]
        return min(filter(None, (self._shortest_cycle(end, products) for end in ends)), key=len)

    def _shortest_cycle(
        self, start: int, avoiding: Collection[int] = (), past: Collection[int] | None = None
    ) -> list[str]:
        """With `past`, by one of these at least."""
        first = (start, past is None)
        before: dict[tuple[int, bool], tuple[int, bool]] = {}
        queue = deque([first])
        while queue:
            here = queue.popleft()
            i, passed = here
            for j in self.successors(i):
                if j == start and passed:
                    path = [here]
                    while path[-1] != first:
                        path.append(before[path[-1]])
                    return [self.lines[k] for k, _ in reversed(path)]
                there = (j, passed or (past is not None and j in past))
                if there not in before and j not in avoiding and j != start:
                    before[there] = here
                    queue.append(there)
        return []

    def early_writes(self) -> set[str]:
        """Instructions that write an operand register of a PV product on some way from it to the wait for it."""
        found = set()
        for i, line in enumerate(self.lines):
            if product := _PRODUCT.search(line):
                operands = range(int(product[1]), int(product[1]) + 4)
                for j in self._until_wait(i):
                    if (write := _WRITE.match(self.lines[j])) and "GMMA" not in self.lines[j]:
                        count = (
                            4 if ".128" in write[1] else 2 if ".64" in write[1] or "WIDE" in write[1] else 1
                        )
                        if set(operands) & set(range(int(write[2]), int(write[2]) + count)):
                            found.add(self.lines[j])
        return found

    def _until_wait(self, start: int) -> set[int]:
        seen: set[int] = set()
        stack = self.successors(start)
        while stack:
            i = stack.pop()
            if i not in seen and _WAIT not in self.lines[i]:
                seen.add(i)
                stack += self.successors(i)
        return seen


def disassemble(cubin: bytes, folder: Path, kernel: str = "attention") -> Code:
    """By the disassembler that triton brings; `folder` is for the file."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    # nvdisasm, which it calls, lies beside it.
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    text = subprocess.run(
        [tool, "-sass", "--function", kernel, path],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text, re.M)
    return Code([(int(address, 16), instruction) for address, instruction in lines])
