"""Benchmarks whose figures need a GPU run here in their smallest form: what they record, and that they resume."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/, which find each other as when started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.usefixtures("without_inductor")
def test_model_rows_are_measured_once(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    model, readme = load("model"), load("readme")
    file = tmp_path / "model.json"
    arguments = ["--tiny", "--models", "llama", "--device", "cpu", "--repeat", "2", "--out", str(file)]

    assert model.main([*arguments, "--budget", "-1"]) == [] and not file.exists()
    assert "stopped before Llama tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model.main([*arguments, "--variants", "reference/fats"])
    assert "reference/fats (valid here: auto/fast," in capsys.readouterr().err

    monkeypatch.setattr(model, "variants", lambda device, tiny: [("auto", "fast")])
    plain, auto = model.main(arguments)
    assert (plain["kernel"], plain["precision"]) == ("plain torch.compile", None)
    assert plain["milliseconds"] > 0 and plain["graph_breaks"] == 0
    assert (auto["rewritten"], auto["sites"], auto["milliseconds"]) == (0, 1, None)
    assert auto["reasons"] == ("device=cpu (supported: cuda)",)

    monkeypatch.setattr(model, "variants", lambda device, tiny: [("auto", "fast"), ("reference", "accurate")])
    again = model.main(arguments)
    assert again[0]["milliseconds"] == plain["milliseconds"] and len(again) == 3
    row = again[2]
    assert (row["kernel"], row["precision"]) == ("reference", "accurate")
    assert (row["rewritten"], row["sites"], row["graph_breaks"]) == (1, 1, 0)
    assert 1e-5 < row["relative_l2"] < 0.013 and row["plain_milliseconds"] > 0

    monkeypatch.setattr(model, "compare", None)  # nothing is left to compare
    rows = model.main(arguments)
    assert rows == json.loads(file.read_text())
    table = readme.model_table(rows)
    assert "| model, layers, tokens | GPU | plain, ms | `reference`, accurate |" in table
    assert "Graph breaks in all of these together: 0." in table


def test_gpu_names_make_file_names(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("model")
    for name, expected in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("CPU", "cpu")):
        monkeypatch.setattr(model, "machine", lambda name=name: {"gpu": name})
        assert model.gpu_name() == expected


def test_sanitize_looks_at_every_kernel(load: Any) -> None:
    pytest.importorskip("triton")
    from sage_inductor.kernels import hopper
    from sage_inductor.kernels.hopper import launch as lists
    from sage_inductor.kernels.triton import launch

    source = (Path(hopper.__file__).parent / "attention.cu").read_text()
    kernels = re.findall(r"__global__[^{]*?(\w+)\(const __grid_constant__", source)
    kernels += [name for module in (launch, lists) for name in vars(module) if name.endswith("_kernel")]
    assert len(kernels) == 12
    known = load("sanitize").KERNELS
    assert [kernel for kernel in kernels if not any(part in kernel for part in known)] == []


def test_sanitize_runs_each_tool_and_counts_findings(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for compute-sanitizer: it runs what it is given, and under racecheck it has a finding instead."""
    fake = tmp_path / "sanitizer"
    fake.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\na = sys.argv[1:]\n"
        "assert '--error-exitcode' in a and 'kns=attention' in a\n"
        "if a[1] == 'racecheck':\n    sys.exit(int(a[a.index('--error-exitcode') + 1]))\n"
        "sys.exit(subprocess.run(a[a.index(sys.executable):]).returncode)\n"
    )
    fake.chmod(0o755)
    arguments = ["--kernel", "reference", "--seeds", "0", "50", "--sanitizer", str(fake)]
    failed = load("sanitize").main([*arguments, "--tools", "memcheck", "racecheck"])
    assert failed == 1
    assert re.findall(r"(\w+): (clean|FOUND SOMETHING)", capsys.readouterr().out) == [
        ("memcheck", "clean"),
        ("racecheck", "FOUND SOMETHING"),
    ]


def test_masks_are_timed_with_and_without_a_look_at_their_blocks(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    masks = load("masks")
    monkeypatch.setattr(masks, "HEADS", 1)
    monkeypatch.setattr(masks, "ROUNDS", 1)
    monkeypatch.setattr(masks, "PAIRS", 260**2)
    monkeypatch.setattr(masks, "CONFIGS", masks.CONFIGS[:1])
    file = tmp_path / "masks.json"
    small = [
        "--sizes",
        "260",
        "--head-dims",
        "32",
        "--precisions",
        "fast",
        "--device",
        "cpu",
        "--out",
        str(file),
    ]
    assert masks.main([*small, "--budget", "-1"]) == [] and "stopped" in capsys.readouterr().err
    found = list(masks.masks(16, "cpu"))
    assert [(name, mask.shape) for name, mask in found] == [
        ("causal", (16, 16)),
        ("window", (16, 16)),
        ("documents", (16, 16)),
        ("prefix", (16, 16)),
        ("padded on the left, additive", (16, 16)),
        ("random", (16, 16)),
        ("bias", (16, 16)),
        ("random, one a head", (1, 16, 16)),
        ("bias, one a head", (1, 16, 16)),
    ]
    by_name = dict(found)
    assert by_name["causal"].sum() == 136 and by_name["window"].all()
    assert by_name["documents"].sum() == 2**2 + 4**2 + 8**2 + 2**2 and by_name["prefix"].sum() == 136 + 6
    assert by_name["padded on the left, additive"].isneginf().sum() == 256 - 136 + 2 * 15 + 1
    assert masks.main([*small, "--masks", "none of them"]) == []

    monkeypatch.setattr(masks, "masks", lambda size, device: [("causal", torch.ones(size, size).tril() > 0)])
    rows = masks.main([*small, "--tune"])
    ours = [
        "triton",
        "triton, read everywhere",
        "triton 64x64 4 warps",
        "triton 64x64 4 warps, read everywhere",
    ]
    assert [list(row["ms"]) for row in rows] == [["sdpa", "sdpa is_causal", *ours]]
    assert rows == json.loads(file.read_text()) and all(ms > 0 for row in rows for ms in row["ms"].values())

    reads = masks.launch.TritonAttention.quantize
    monkeypatch.setattr(
        masks.launch.TritonAttention,
        "quantize",
        lambda self, q, k, v, mask, *rest: reads(self, q, k, v, ~mask, *rest),
    )
    with pytest.raises(SystemExit, match="triton.* under causal, .*: relative L2 .* from SDPA"):
        masks.main(small)


@pytest.mark.usefixtures("without_inductor")
def test_the_table_of_masks(load: Any, tmp_path: Path) -> None:
    """Its smallest row, in this process, and what is said of rows."""
    table = load("masks_table")
    file = tmp_path / "table.json"
    table.run("packed", table.Machine("cpu", True, 1, str(tmp_path)), file)
    rows = json.loads(file.read_text())
    assert [row["contender"] for row in rows] == [
        "SDPA with the mask",
        "segments, reference",
        "compiled, reference",
    ]
    assert all(row["ms"] > 0 and row["relative_l2"] < 0.1 for row in rows)
    assert rows[-1]["masks"] == ["causal + segments"] and rows[-1]["kernels"] == ["reference"]
    assert sum(table.document_lengths(table.Machine("cuda", False, 1, ""))) == 32_768
    row = {"row": "bert", "case": "padded", "ms": 2.0, "peak_mib": None}
    base = row | {"contender": "SDPA"}
    for ms, fits in ((2.0, True), (2.1, False)):
        ours = row | {"contender": "auto", "ms": ms, "of": "SDPA", "at_most": 1.03}
        text, within = table.report([base, ours])
        assert within is fits and f"{ms / 2:.3f} of SDPA" in text
    failed = {key: value for key, value in base.items() if key != "ms"} | {"error": "no memory"}
    assert "no memory" in table.report([failed, ours])[0]

    def model(q: torch.Tensor) -> torch.Tensor:
        assert torch.compiler.is_compiling(), "run eagerly"
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    on = table.Machine("cpu", True, 1, str(tmp_path))
    contenders = [
        table.ours("as it is", model, (torch.randn(1, 2, 64, 32),), on),
        table.Contender("fails", lambda: model(torch.randn(1, 2, 64, 32))),
    ]
    entry, fails = table.measure(contenders, on)
    assert (entry["masks"], entry["kernels"], entry["relative_l2"]) == (["causal"], ["reference"], 0)
    assert fails == {"contender": "fails", "error": "AssertionError: run eagerly"}
    for name in ("masks_table", "masks_models", "found_sites", "timing"):
        sys.modules.pop(name, None)


@pytest.fixture
def pipelines(load: Any) -> Iterator[Any]:
    """benchmarks/pipelines.py, under another name than the helper that is called so too."""
    spec = importlib.util.spec_from_file_location("pipelines_measured", BENCHMARKS / "pipelines.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.usefixtures("without_inductor")
def test_contenders_of_a_pipeline(pipelines: Any, load: Any, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    on = pipelines.Machine("cpu", True, 2, str(tmp_path))
    workers = []
    for name, sites in (("eager", None), ("torch.compile", None), ("sage_inductor", "2 of 2")):
        torch._dynamo.reset()
        contender = pipelines.Contender("wan", name, on)
        facts = {"pipeline": "wan", "contender": name, **contender.first_call()}
        assert (facts["graphs"], facts["graph_breaks"]) == (0 if name == "eager" else 1, 0)
        assert facts.get("sites") == sites  # the block's two attentions, once for all blocks
        calls = [contender.call(), contender.call()]
        assert [len(call["step_ms"]) for call in calls] == [
            1,
            1,
        ]  # from the end of a step to that of the next
        assert [len(call["denoiser_ms"]) for call in calls] == [4, 4]  # guidance calls it twice a step
        workers.append(types.SimpleNamespace(facts=facts, calls=calls))
    eager, plain, ours = pipelines.entries("wan", workers, on)
    assert eager["relative_l2"] < 1e-5 and plain["relative_l2"] == 0 and 1e-4 < ours["relative_l2"] < 0.1
    assert plain["ratio"] == 1 and ours["kernels"] == {"reference": 2}
    assert not any(map(pipelines.failed, (eager, plain, ours)))
    assert pipelines.failed(ours | {"relative_l2": 1.0}) and pipelines.failed(ours | {"finite": False})
    assert "2 of 2 rewritten (reference 2)" in pipelines.report([ours])
    of_gpu = {
        "gpu": "H",
        "torch": "2",
        "diffusers": "0",
        "steps": 2,
        "weights_mib": 100.0,
        "peak_denoising_mib": 1350.0,
    }
    failed = {"pipeline": "flux", "contender": "eager", "error": "no memory"}
    found = {
        "pipeline": "flux",
        "contender": "calibrate_pipeline",
        "calibrate_s": 99.6,
        "decisions": {"fast": 8, "sdpa": 1},
    }
    text = load("readme").pipelines_section([of_gpu | plain, of_gpu | ours, failed, found])
    assert (
        text.count("| Wan 2.1 1.3B, 832 x 480, 81 frames | `") == 2
        and "| 1,250 |" in text
        and "no memory" not in text
    )
    assert "`calibrate_pipeline` of the same Flux takes 100 s: fast 8, sdpa 1" in text


def test_models_of_pipelines_keep_what_weights_would(pipelines: Any) -> None:
    """In bfloat16, but for what `from_pretrained` leaves in float32; tables of positions as the model makes them."""
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    on = pipelines.Machine("cpu", True, 2, "")
    expected = pipelines.wan(on)[0].transformer
    on = types.SimpleNamespace(device="cpu", dtype=torch.bfloat16)
    model = pipelines.made(lambda: WanTransformer3DModel.from_config(expected.config), on)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert torch.equal(model.rope.freqs_cos, expected.rope.freqs_cos)


def test_pipelines_are_run_in_processes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / "pipelines.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "pipelines.py"),
        "--tiny",
        "--device",
        "cpu",
        "--out",
        str(file),
    ]
    command += ["--parts", "flux", "--rounds", "1", "--steps", "2", "--contenders"]
    done = subprocess.run([*command, "eager", "flash_attention_3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    eager, flash = json.loads(file.read_text())
    assert len(eager["calls_s"]) == 1 and eager["finite"] and eager["denoiser_ms"] > 0
    assert flash["error"] in done.stdout  # neither the wheel nor a GPU is here


def test_a_contender_that_takes_too_long(pipelines: Any, tmp_path: Path) -> None:
    on = pipelines.Machine("cpu", True, 2, str(tmp_path))
    (entry,) = pipelines.measure("flux", ["eager"], on, rounds=1, limit=0.0, one=60.0)
    assert entry == {"pipeline": "flux", "contender": "eager", "error": "build: 0 s are spent"}
    assert pipelines.failed(entry) and not pipelines.failed(entry | {"contender": "flash_attention_3"})


def test_skip_plants_what_can_be_left_out(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    skip = load("skip")
    file = tmp_path / "skip.json"
    rows = skip.main(["--tiny", "--patterns", "stripes", "--out", str(file)])
    assert json.loads(file.read_text()) == rows
    assert [row["skip_by"] for row in rows] == ["scores", "sample"]
    for row in rows:
        assert (row["share"], row["missed"], row["of"], row["pattern"]) == (0.5, 0.0, 2, "stripes")
        assert 0 < row["added"] < 1e-4 and row["ratio"] == row["ms_off"] / row["ms_on"]
        assert 1e-3 < row["error_off"] < 0.06 and 1e-3 < row["error_on"] < 0.06
    assert rows[1]["with_lists"] == rows[1]["ms_off"] / (rows[1]["ms_on"] + rows[1]["ms_lists"])
    # Each pattern at the size of a GPU's problem, without its time.
    for pattern, least, most, by_sample in (
        ("none", 0, 0, 0),
        ("blocks", 0.3, 0.5, 0.5),
        ("band", 0.2, 0.4, 0.5),  # a sample sees the band before the blocks in front of it
        ("sink+band", 0.45, 0.55, 0.5),
    ):
        q, k, _ = skip.Problem(2048, 1, 32, "fast", pattern, 2).inputs()
        share = skip.skipped_share(skip.tile_margins(q, k), skip.THRESHOLD)
        assert least <= share <= most, (pattern, share)
        share = skip.skipped_share(skip.tile_margins(q, k, skip_by="sample"), skip.THRESHOLD)
        assert share == pytest.approx(by_sample, abs=0.1), (pattern, share)


def test_what_skipping_adds_is_no_kernels_rounding(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose output with a threshold is off by a tenth has that in its error, and `added` stays what the tiles cost."""
    pytest.importorskip("triton")
    skip = load("skip")
    right = skip.TritonAttention

    class Off(right):  # type: ignore[misc, valid-type]
        def __init__(self, q: Any, k: Any, v: Any, mask: Any, params: Any, *rest: Any) -> None:
            super().__init__(q, k, v, mask, params, *rest)
            self.off = 1.1 if params.skip_threshold else 1.0

        def attend(self, workspace: Any, mask: Any, out: torch.Tensor, *rest: Any) -> None:
            super().attend(workspace, mask, out, *rest)
            out.mul_(self.off)

    problem = skip.Problem(256, 1, 32, "fast", "stripes", 2)
    expected = skip.measure(problem, 0.0)
    monkeypatch.setattr(skip, "attention_of", lambda kernel: Off)
    found = skip.measure(problem, 0.0)
    assert found["added"] == expected["added"] > 0 and found["error_off"] == expected["error_off"]
    assert found["error_on"] > 0.09 > 0.06 > expected["error_on"]

    # The second block of keys is left out for all queries: softmax over the first against that over both.
    q, k, v = (tensor.double() for tensor in problem.inputs())
    whole = torch.softmax(q @ k.mT / 32**0.5, -1) @ v
    without = torch.softmax(q @ k[:, :, :128].mT / 32**0.5, -1) @ v[:, :, :128]
    margins = skip.tile_margins(q.float(), k.float())
    rows = torch.arange(256)
    exact, added = skip.what_tiles_cost(problem.inputs(), margins, skip.SkipTile(), 0.001, rows)
    assert torch.allclose(exact, whole)
    assert added == pytest.approx(skip.relative_l2(without, whole), rel=1e-6)
    # A threshold that leaves out nothing adds nothing; a wrong tile shows.
    assert skip.what_tiles_cost(problem.inputs(), margins, skip.SkipTile(), 0.0, rows)[1] == 0.0
    margins[:, :, 1:3] = margins[:, :, 1:3].flip(3)
    assert skip.what_tiles_cost(problem.inputs(), margins, skip.SkipTile(), 0.001, rows)[1] > 0.5


@pytest.mark.usefixtures("without_inductor")
def test_skip_model_plants_scores_in_wan(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("diffusers")
    skip_model = load("skip_model")
    file = tmp_path / "skip_model.json"
    rows = skip_model.main(
        ["--tiny", "--layers", "1", "--patterns", "none", "stripes", "blocks", "--out", str(file)]
    )
    assert json.loads(file.read_text()) == rows
    assert [row["contender"] for row in rows] == ["plain", "dense", "scores", "sample"] * 3
    for row in rows:
        ours, skips = row["contender"] != "plain", row["contender"] in skip_model.DECIDERS
        assert (row["tokens"], row["layers"], row["graph_breaks"]) == (1024, 1, 0)
        # Both attentions of the layer, and both have the threshold where there is one.
        assert (row["rewritten"], row["sites"], row["skipping"]) == (2 * ours, 2 * ours, 2 * skips)
        assert row["skip_threshold"] == (0.001 if skips else None)
        # Plain is compared with the eager model under the pattern at hand, which what is compiled has to read anew.
        assert 1e-4 < row["relative_l2"] < 0.01 if ours else row["relative_l2"] < 1e-5
    shares = {(row["pattern"], row["skip_by"]): row["share"] for row in rows if "share" in row}
    assert shares["none", "scores"] == shares["none", "sample"] == 0
    assert shares["stripes", "scores"] == shares["stripes", "sample"] == 0.5
    assert 0.35 < shares["blocks", "scores"] <= shares["blocks", "sample"] < 0.55
    assert all(0 <= row["added"] < 1e-4 for row in rows if "added" in row)

    # Where nothing is planted and nothing scaled, the processor is Wan's own; what is planted reaches the output.
    wan_video = skip_model.wan_video
    model, inputs = wan_video.build(wan_video.SIZES["tiny"], skip_model.TINY_LATENTS, 1, "cpu", torch.float32)
    attn = model.blocks[0].attn1
    with torch.no_grad():
        expected = model(**inputs)[0]
        attn.set_processor(skip_model.PlantedProcessor(1024, 128))
        with monkeypatch.context() as patch:
            patch.setattr(skip_model.skip, "NOISE", 1.0)
            output, ((q, _, _),) = skip_model.run_eagerly(model, inputs)
        assert q.shape == (1, 1, 1024, 128) and not attn._forward_hooks
        assert skip_model.relative_l2(output, expected) < 1e-6
        outputs = []
        for pattern in ("stripes", "blocks"):
            attn.processor.plant(skip_model.skip.Problem(1024, 2, 128, "fast", pattern, 2))
            outputs.append(model(**inputs)[0])
    assert skip_model.relative_l2(*outputs) > 1e-3


def test_quality_of_a_language_model(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both scripts with a small model of random weights in the place of the trained one."""
    transformers = pytest.importorskip("transformers")
    quality, skip_quality = load("quality"), load("skip_quality")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128,
    )  # fmt: skip
    ids = torch.randint(128, (1, 400))
    devices = []

    def small(device: str) -> tuple[Any, Any]:
        devices.append(device)
        model = transformers.LlamaForCausalLM(config).eval().to(device)
        return model, lambda text, return_tensors: types.SimpleNamespace(input_ids=ids)

    file = tmp_path / "found.json"
    for module, arguments, count in (
        (quality, ["--smoothings", "mean", "both"], 6),
        (skip_quality, ["--thresholds", "0.9", "--by", "sample"], 2),
    ):
        monkeypatch.setattr(module, "load", small)
        rows = module.main(["--tokens", "300", "--device", "cpu", "--out", str(file), *arguments])
        found = json.loads(file.read_text())
        assert found["rows"] == rows and len(rows) == count and "argparse.py" in found["text"]
        for row in rows:
            assert (row["gpu"], row["torch"], row["layers"]) == ("CPU", torch.__version__, 2)
            assert 0 < row["median_rel_l2"] < 0.1 and row["perplexity_sdpa"] > 1
    assert rows[1]["skip_threshold"] == 0.9 and 0 <= rows[1]["mean_share"] < 1
    assert devices == ["cpu", "cpu"]

    # A CPU's rows say so beside a GPU, too.
    monkeypatch.setattr(quality, "machine", lambda: {"gpu": "NVIDIA H200", "torch": "2"})
    assert quality.facts("cpu") == {"gpu": "CPU", "torch": "2"}
    assert quality.facts("cuda") == {"gpu": "NVIDIA H200", "torch": "2"}


@pytest.mark.usefixtures("without_inductor")
def test_where_workspaces_lie(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    workspace = load("workspace")
    file = tmp_path / "workspace.json"
    rows = workspace.main(["--tiny", "--device", "cpu", "--layers", "2", "--out", str(file)])
    assert json.loads(file.read_text()) == rows
    assert [row["contender"] for row in rows] == ["plain", "as it is", "kept"]
    plain, ours, kept = rows
    assert (plain["addresses"], plain["workspace_mib"]) == (0, 0) and ours["addresses"] in (1, 2)
    assert kept["addresses"] == 1 and kept["workspace_mib"] == ours["workspace_mib"]
    assert workspace.launch.torch is torch
