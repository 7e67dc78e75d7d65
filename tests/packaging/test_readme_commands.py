"""What the README shows works as it stands there: each command and each block of Python, in a clone, from its root.

Once after `pip install .` and once after `pip install -e .`, where the commands are slow: what differs is which files Python
finds, and the blocks of Python are run there too. Every block is run or named here with the reason why not, so that a new one is
covered as soon as it is written. What a block takes for granted (a model, its inputs) is supplied here, small.

Commands of Python are run by copies of one process that has imported torch, which takes longer than most of them; what
they see of the package, their path and their arguments are those of a process of their own. `doctor` gets one, in a shell.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from environments import ROOT, Environment, clone, environment_of_a_user, required

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it there

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.strip() and not line.startswith("#")
]
# Commands in running text.
COMMANDS += [
    text for text in re.findall(r"`([^`\n]+)`", README) if re.match(r"(python3?|pip|torchrun) ", text)
]

# Not run as they stand, by what they begin with: the reason, and what is run instead if anything is.
INSTEAD: dict[str, tuple[str, str | None]] = {
    "python3 -m venv .venv": (".ci/run runs it word for word: it installs torch", None),
    'pip install "sage_inductor[cli]"': ("needs a package index; pyproject.toml has the extra", None),
    "python tests/helpers/sweep.py": (
        "needs a GPU for --kernel triton",
        "python tests/helpers/sweep.py --kernel reference --seeds 0 2 --jobs 1 --state sweep.json",
    ),
    "python benchmarks/sanitize.py": (
        "needs a GPU and compute-sanitizer",
        "python benchmarks/sanitize.py --help",
    ),
    "python -m sage_inductor bench --shape 1,24,16384,128": (
        "16,384 tokens take a CPU minutes; there only the reference kernel can run",
        "python -m sage_inductor bench --shape 1,2,64,64 --kernel reference",
    ),
    "torchrun ": ("needs several processes, and a GPU for each", None),
}
# What the README says `make_model` is.
MODEL = """\
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, x):
        q, k, v = x.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def make_model():
    return nn.Sequential(nn.Linear(32, 96), Attention()).eval(), (torch.randn(1, 40, 32),)
"""
# What the blocks of Python take for granted. Each gets names of its own.
PREAMBLE = """\
import torch
import sage_inductor
from model import make_model

torch.manual_seed(0)
model, inputs = make_model()
pipeline = model
x1, x2 = torch.randn(2, 1, 40, 32)
query, key, value = torch.randn(3, 1, 2, 40, 32)
ids = torch.zeros(1, 40, dtype=torch.int32)
config = sage_inductor.Config(kernel="reference")

class MyPass(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __call__(self, graph): pass
    def uuid(self): return "mine"

my_pass = MyPass()
"""
BLOCKS_OF_PYTHON = """
import sys, warnings
sys.path.insert(0, "")  # as in a session, or `python -m`
import sage_inductor
import torch
import torch._inductor.custom_graph_pass
torch.set_grad_enabled(False)
preamble, *blocks = {texts!r}
for number, block in enumerate(blocks):
    names = {{}}
    exec(preamble, names)
    # Ellipsis stands for the arguments of a call of the reader's.
    block = block.replace("pipeline(...)", "pipeline(*inputs)")
    exec(compile(block, f"block {{number}} of README.md", "exec"), names)
    if "compiled" in names:
        names["compiled"](*names["inputs"])
    print("ran block", number)
"""
# Reads commands (`python -m module ...`, `python script ...`, `python -c code`) as JSON, a list of arguments a line, and answers
# each with what a copy of itself, which ran it, returned and printed. The package is imported by the copies, each by its own path.
SERVER = """
import json, os, runpy, sys, tempfile, traceback
import torch, torch._inductor.compile_fx
answers = os.fdopen(os.dup(1), "w")

def run(how, *rest):
    if how == "-m":
        sys.argv, sys.path[0] = list(rest), os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [how, *rest], os.path.dirname(how)
        runpy.run_path(how, run_name="__main__")

for line in sys.stdin:
    printed, complained = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(printed.fileno(), 1)
        os.dup2(complained.fileno(), 2)
        code = 0
        try:
            run(*json.loads(line)[1:])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (printed, complained):
        file.seek(0)
        texts.append(file.read().decode())
    print(json.dumps([code, *texts]), file=answers, flush=True)
"""

# As tests/examples runs it, so that Inductor's cache has what one of the two compiled.
SMALL = ("--tokens", "96", "--heads", "2", "--repeat", "2")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="environments are laid out for POSIX")


@dataclass
class Installed:
    """A clone with the package installed from it, as the README says."""

    root: Path
    python: Path
    server: subprocess.Popen[str] | None = None

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """In the root, the environment activated."""
        activate = f'. "{self.python.parent / "activate"}"'
        # One folder for both forms: what Inductor compiled for one, the other reads.
        return subprocess.run(
            ["bash", "-e", "-c", f"{activate}\n{command}"],
            cwd=self.root, env=environment_of_a_user(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`python ...` in the root, by a copy of the server."""
        assert command[0] == "python", command
        if self.server is None:
            self.server = subprocess.Popen(
                [self.python, "-c", SERVER],
                cwd=self.root, env=environment_of_a_user(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(command), file=self.server.stdin, flush=True)
        code, *printed = json.loads(self.server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *printed)

    def end(self) -> None:
        if self.server is not None:
            self.server.communicate()  # it ends with its input


FORMS = [pytest.param(form, marks=pytest.mark.xdist_group(form), id=form) for form in ("plain", "editable")]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Installed]]:
    """Each form of installation, made when it is first asked for. (pytest makes a fixture of this scope anew for each set of
    parameters that a form stands in.)"""
    made: dict[str, Installed] = {}

    def get(form: str) -> Installed:
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            root = clone(folder / "repository")
            environment = Environment(folder / "environment")
            environment.install(*(["-e"] if form == "editable" else []), ".", cwd=root)
            (root / "model.py").write_text(MODEL)
            made[form] = Installed(root, environment.python)
        return made[form]

    yield get
    for installed in made.values():
        installed.end()


@pytest.fixture(params=FORMS)
def installed(request: pytest.FixtureRequest, forms: Callable[[str], Installed]) -> Installed:
    return forms(request.param)


def replaced(command: str) -> str | None:
    """The command as it is run here; None where it cannot be."""
    for start, (_, instead) in INSTEAD.items():
        if command.startswith(start):
            return instead
    return command


def test_what_is_not_run_is_in_the_readme() -> None:
    """torchrun, which may come, apart: a reason without its command is stale."""
    for start in INSTEAD:
        assert start == "torchrun " or any(command.startswith(start) for command in COMMANDS), start
    assert PYTHON and len(COMMANDS) >= 10
    assert {language for language, _ in BLOCKS} <= {"python", "bash"}


def commands() -> Iterator[Any]:
    """Each command for each form of installation."""
    for form in FORMS:
        for command in dict.fromkeys(filter(None, map(replaced, COMMANDS))):
            again = form.id == "editable"
            marks = [*form.marks, *([pytest.mark.slow] if again else [])]
            yield pytest.param(*form.values, command, marks=marks, id=f"{form.id}-{command}")


@pytest.mark.parametrize(("installed", "command"), list(commands()), indirect=["installed"])
def test_commands(installed: Installed, command: str) -> None:
    words = shlex.split(command, comments=True)
    by_itself = "doctor" in words or words[0] != "python"
    done = installed.shell(command) if by_itself else installed.run(*words)
    # 3: no kernel can run here, but for the oracle.
    expected = 3 if "doctor" in words and not torch.cuda.is_available() else 0
    assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"


def test_explain_takes_the_example_that_the_readme_names(installed: Installed) -> None:
    (spec,) = set(re.findall(r"`(examples/\S+\.py:\w+)`", README))
    done = installed.run("python", "-m", "sage_inductor", "explain", spec, "--kernel", "reference")
    assert done.returncode == 0, done.stderr
    assert "3 attention(s): 2 rewritten, 1 left" in done.stdout


def test_blocks_of_python(installed: Installed) -> None:
    done = installed.run("python", "-c", BLOCKS_OF_PYTHON.format(texts=[PREAMBLE, *PYTHON]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran block") == len(PYTHON)


def test_the_quickstart_has_nothing_to_complain_about(tmp_path: Path) -> None:
    """In an environment that has what the README's first command installs, and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = Environment(tmp_path / "environment", required(["torch", *project["dependencies"]]))
    root = clone(tmp_path / "repository")
    environment.install(".", cwd=root)
    done = Installed(root, environment.python).shell(f"python examples/quickstart.py {' '.join(SMALL)}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "relative L2 error" in done.stdout
