"""The choice by measurement, with times that are made up: what is compared, kept, looked up and decided."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_inductor import Config, Site, calibrate, kernels
from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec, installed
from sage_inductor.testing import RewritingBackend, graph_text, relative_l2
from sage_inductor.tuning import Choice, Comparison, SdpaCall, choice, choose, measure, store
from sage_inductor.tuning import machine as machine_module
from sage_inductor.tuning.comparison import bucket
from sage_inductor.tuning.machine import Machine, digest, machine, machines
from sage_inductor.tuning.measure import CannotMeasure
from sage_inductor.tuning.store import Result, Store, Timing

CPU = torch.device("cpu")


def spec(*shape: int, order: str = "hnd", dtype: torch.dtype = torch.bfloat16) -> TensorSpec:
    dims = (0, 1, 2, 3) if order == "hnd" else (0, 2, 1, 3)
    stride = torch.empty_permuted(shape, dims, device="meta").stride()
    return TensorSpec(shape, stride, dtype, CPU)


def compare(q_len: int = 1000, kv_len: int | None = None, heads: int = 8, **params: Any) -> Comparison:
    query = spec(1, heads, q_len, 64)
    key = spec(1, heads, q_len if kv_len is None else kv_len, 64)
    problem = AttentionProblem(query, key, key, None, AttentionParams(**params))
    return Comparison(problem, SdpaCall(query, key, key, None, params.get("is_causal", False), None, False))


Model = Callable[[str, int, int], float]


class Measured:
    """Stands for `measure`: times from a model of (name, q_len, kv_len), and what was asked for."""

    def __init__(self, model: Model, noise: float = 0.0) -> None:
        self.model, self.noise = model, noise
        self.calls: list[tuple[int, int]] = []

    def __call__(self, comparison: Comparison, names: list[str]) -> Result:
        self.calls.append(comparison.lengths)
        sdpa = self.model("sdpa", *comparison.lengths)
        times = {name: self.model(name, *comparison.lengths) for name in names}
        timings = {name: Timing(ms, ms / sdpa, self.noise) for name, ms in times.items()}
        return Result(*comparison.lengths, sdpa, timings)


def constant(**times: float) -> Model:
    return lambda name, q_len, kv_len: times[name]


@pytest.fixture(autouse=True)
def cpu_chooses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ "auto" chooses on the CPU, between the reference and SDPA."""
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("reference",))
    with torch.no_grad():
        yield


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measured]:
    def install(model: Model, noise: float = 0.0) -> Measured:
        stand_in = Measured(model, noise)
        monkeypatch.setattr(measure, "measure", stand_in)
        return stand_in

    return install


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(cache_dir=str(tmp_path / "cache"))


# What is compared.


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 1000, 1023, 1024, 32760, 75600])
def test_a_bucket_holds_lengths_within_a_quarter(length: int) -> None:
    first, last = map(int, bucket(length).split(" to "))
    assert first <= length <= last and last / first < 1.25
    assert bucket(first) == bucket(last) == bucket(length) != bucket(last + 1)


def test_lengths_change_and_layouts_stay() -> None:
    def fused(q_len: int) -> TensorSpec:  # a slice of [batch, seq, 3, heads, dim]
        return TensorSpec((2, 8, q_len, 64), (q_len * 1536, 64, 1536, 1), torch.bfloat16, CPU)

    def transposed(kv_len: int) -> TensorSpec:  # keys stored as [batch, heads, dim, seq]
        return TensorSpec((2, 8, kv_len, 64), (512 * kv_len, 64 * kv_len, 1, kv_len), torch.bfloat16, CPU)

    def padded(q_len: int, kv_len: int) -> TensorSpec:  # a mask whose rows have room, expanded over heads
        return TensorSpec((2, 8, q_len, kv_len), (q_len * kv_len * 2, 0, 2 * kv_len, 1), torch.bool, CPU)

    def at(q_len: int, kv_len: int) -> Comparison:
        q, k, v, mask = fused(q_len), transposed(kv_len), spec(2, 8, kv_len, 64), padded(q_len, kv_len)
        row = TensorSpec((2, 1, 1, kv_len), (kv_len, kv_len, kv_len, 1), torch.bool, CPU)
        return Comparison(
            AttentionProblem(q, k, v, row, AttentionParams()), SdpaCall(q, k, v, mask, False, None, False)
        )

    assert at(1000, 500).at(2000, 300) == at(2000, 300)
    assert at(1000, 500).at(2000, 300).at(1000, 500) == at(1000, 500)


def _without_batch(tensor: TensorSpec) -> TensorSpec:
    return replace(tensor, shape=tensor.shape[1:], stride=tensor.stride[1:])


def test_the_key_knows_all_but_the_length() -> None:
    base = compare(1000)
    before = base.key()
    assert before == compare(1001).key() == json.loads(json.dumps(base.key()))
    nhd = replace(base, problem=replace(base.problem, query=spec(1, 8, 1000, 64, order="nhd")))
    tensors = {name: _without_batch(getattr(base.sdpa, name)) for name in ("query", "key", "value")}
    flat = replace(base, sdpa=replace(base.sdpa, **tensors))
    masked = replace(base, sdpa=replace(base.sdpa, attn_mask=spec(1, 1, 1000, 1000, dtype=torch.bool)))
    unaligned = replace(base.problem.query, stride=(513000, 64125, 65, 1))
    others = [
        compare(1024), compare(1000, 2000), compare(heads=4), compare(is_causal=True), compare(window_left=5),
        compare(precision="accurate"), nhd, masked, flat,
        replace(base, sdpa=replace(base.sdpa, enable_gqa=True)),
        replace(base, sdpa=replace(base.sdpa, is_causal=True)),
        replace(base, problem=replace(base.problem, query=unaligned)),
    ]  # fmt: skip
    texts = {json.dumps(other.key(), sort_keys=True) for other in (base, *others)}
    assert len(texts) == 1 + len(others)
    with sdpa_kernel(
        [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    ):  # switched off elsewhere: slower, as a rule
        assert base.key() != before
    assert base.key() == before


# What is kept.

MACHINE = Machine("H100", "580.1", "2.11", "9.1", "3.6", "none", "abc")
KEY = {"what": "ever"}
RESULT = Result(1000, 1000, 1.0, {"triton": Timing(0.9, 0.9, 0.01)}, {"other": "it failed"})


def test_results_come_back(tmp_path: Path) -> None:
    kept = Store(str(tmp_path), MACHINE)
    assert kept.load(KEY) == []
    kept.save(KEY, RESULT)
    kept.save(KEY, replace(RESULT, q_len=1001))
    kept.save(KEY, replace(RESULT, sdpa_ms=2.0))
    assert kept.load(KEY) == [replace(RESULT, q_len=1001), replace(RESULT, sdpa_ms=2.0)]
    assert kept.load({"what": "else"}) == []
    (file,) = tmp_path.rglob("*.*")
    assert json.loads(file.read_text())["machine"]["device"] == "H100"
    for fact in ("device", "driver", "torch", "cudnn", "triton", "sageattention", "kernels"):
        assert Store(str(tmp_path), replace(MACHINE, **{fact: "new"})).load(KEY) == [], fact


def _changed(**changes: Any) -> bytes:
    data = {"format": 1, "key": KEY, "results": [{"q_len": 1, "kv_len": 1, "sdpa_ms": 1.0, "kernels": {},
            "failed": {}}]}  # fmt: skip
    return json.dumps({**data, **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe\x00", _changed()[:60], _changed(format=0), _changed(key={}),
        _changed(results=None), _changed(results=[1]), _changed(results=[{}]),
        _changed().replace(b'"sdpa_ms": 1.0', b'"sdpa_ms": NaN'),
        _changed().replace(b'"sdpa_ms": 1.0', b'"sdpa_ms": -1'),
        _changed().replace(b'"kernels": {}', b'"kernels": {"triton": 3}'),
    ],
)  # fmt: skip
def test_corrupt_files_count_as_absent_and_are_replaced(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Store(str(tmp_path), MACHINE)
    kept.save(KEY, RESULT)
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(content)
    assert kept.load(KEY) == [] and "not readable" in caplog.text
    kept.save(KEY, RESULT)
    assert kept.load(KEY) == [RESULT]


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, measured: Any
) -> None:
    (tmp_path / "file").touch()
    times = measured(constant(sdpa=1.0, reference=0.5))
    config = Config(cache_dir=str(tmp_path / "file"))
    for q_len in (1000, 2000):
        for _ in range(2):
            assert choose(compare(q_len), config) == Choice("reference", (), 2.0)
    assert times.calls == [(1000, 1000), (2000, 2000)]
    assert [record.levelname for record in caplog.records].count("WARNING") <= 2
    assert "not kept" in caplog.text


WRITER = """
import sys
from sage_inductor.tuning.machine import Machine
from sage_inductor.tuning.store import Result, Store, Timing
folder, worker = sys.argv[1], int(sys.argv[2])
kept = Store(folder, Machine(*"abcdefg"))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(200):
    kept.save({"k": 1}, Result(worker + 1, turn % 20 + 1, 1.0, {"triton": Timing(1.0, 1.0, 0.0)}))
    assert kept.load({"k": 1}), "a reader saw no file or half of one"
"""


def test_processes_that_write_at_once_leave_whole_files(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [subprocess.Popen([*command, str(worker)], text=True, **pipes) for worker in range(2)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        _, errors = worker.communicate("go\n", timeout=120)
        assert worker.returncode == 0 and "not readable" not in errors, errors
    (file,) = tmp_path.rglob("*.*")  # no temporary file is left
    assert Store(str(tmp_path), Machine(*"abcdefg")).load({"k": 1})


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.default_folder() == tmp_path / "sage_inductor"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    monkeypatch.setenv("HOME", "/home/somebody")
    assert store.default_folder() == Path("/home/somebody/.cache/sage_inductor")


def test_without_a_home_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    kept = Store(None, MACHINE)
    kept.save(KEY, RESULT)
    assert kept.load(KEY) == [] and "no folder for measured times" in caplog.text


def test_the_machine_changes_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert machine(CPU) == machine(CPU) and machines() == []
    file = Path(kernels.__file__)
    before = digest([file]).hexdigest()
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"changed")
    assert digest([file]).hexdigest() != before


def test_the_facts_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, new_process: Callable[[], None]
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(installed, "DRIVER_FILE", driver)
    monkeypatch.setattr(machine_module, "cuda_driver_api", lambda: 13000)
    here = machine(torch.device("cuda", 0))
    assert here.device == "NVIDIA H100 80GB HBM3, 132 SMs" and here.driver == "580.95.05, CUDA 13000"
    assert machines() == [here]  # two GPUs of one kind
    monkeypatch.setattr(installed, "DRIVER_FILE", tmp_path / "nowhere")
    new_process()
    assert machine(torch.device("cuda", 1)).driver == "?, CUDA 13000"


# What is decided.


def test_the_fastest_wins_and_is_measured_once(
    measured: Any, config: Config, monkeypatch: pytest.MonkeyPatch, new_process: Callable[[], None]
) -> None:
    monkeypatch.setattr(kernels, "AUTO_ORDER", ("reference", "triton"))
    for judged in ("unavailable_reasons", "not_supported_reasons"):  # it is chosen here, not run
        monkeypatch.setattr(type(kernels.get("triton")), judged, lambda *args: [])
    times = measured(constant(sdpa=1.0, reference=0.9, triton=0.8))
    for _ in range(30):
        assert choose(compare(), config) == Choice("triton", (), 1.25)
    assert len(times.calls) == 1
    new_process()
    assert choose(compare(), config).kernel == "triton"
    assert len(times.calls) == 1  # out of the file


@pytest.mark.parametrize(
    ("ratio", "noise", "kernel"),
    [(1.2, 0, None), (1.0, 0, None), (0.985, 0, None), (0.975, 0, "reference"), (0.975, 0.03, None), (0.9, 0.03, "reference")],
)  # fmt: skip
def test_sdpa_wins_ties(
    ratio: float, noise: float, kernel: str | None, measured: Any, config: Config
) -> None:
    measured(constant(sdpa=2.0, reference=2.0 * ratio), noise)
    chosen = choose(compare(), config)
    assert chosen.kernel == kernel and chosen.speedup == pytest.approx(1 / ratio)
    if kernel is None:
        (text,) = chosen.reasons
        assert text.startswith(f"time={2 * ratio:.3g} ms reference fast (SDPA: 2 ms on ")
        assert "measured" in text and ("wins from" in text) == (ratio < 1)


def test_near_the_crossover_every_length_is_measured(measured: Any, config: Config) -> None:
    times = measured(lambda name, q_len, kv_len: 1.0 if name == "sdpa" else 1040 / q_len)
    chosen = {q_len: choose(compare(q_len), config).kernel for q_len in (1030, 1100, 1200, 1100)}
    assert chosen == {1030: None, 1100: "reference", 1200: "reference"}
    assert [q_len for q_len, _ in times.calls] == [1030, 1100, 1200]
    times = measured(lambda name, q_len, kv_len: 1.0 if name == "sdpa" else 0.79)
    assert {choose(compare(q_len), config).kernel for q_len in (4096, 4097, 5119)} == {"reference"}
    assert len(times.calls) == 1


@pytest.mark.parametrize("quantising", [0.0, 0.3, 1.0, 30.0])
def test_what_a_bucket_decides_is_never_slower_elsewhere_in_it(quantising: float) -> None:
    """With times in proportion to what is quantised (q_len + kv_len) and to what is attended (q_len * kv_len)."""

    def ratio(q_len: int, kv_len: int, attending: float) -> float:
        return attending + quantising * 1024 * (1 / q_len + 1 / kv_len)

    ends = 1024, 1279
    for percent in range(5, 200):
        for measured_q in ends:
            for measured_kv in ends:
                at = ratio(measured_q, measured_kv, percent / 100)
                result = Result(measured_q, measured_kv, 1.0, {"triton": Timing(at, at, 0.0)})
                for q_len in ends:
                    for kv_len in ends:
                        if result.decides(q_len, kv_len, ["triton"]) and at < 1:
                            assert ratio(q_len, kv_len, percent / 100) <= max(1.0, at)
    assert not RESULT.decides(1000, 1000, ["a kernel that came later"])


def test_a_kernel_that_fails_is_not_used(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    new_process: Callable[[], None],
) -> None:
    def fails(comparison: Comparison, names: Any) -> Result:
        return Result(*comparison.lengths, 1.0, {}, {"reference": "ValueError: no luck"})

    monkeypatch.setattr(measure, "measure", fails)
    expected = Choice(None, ("reference: failed while measured: ValueError: no luck",))
    assert choose(compare(), config) == expected and "no luck" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure", lambda *args: pytest.fail("measured again"))
        assert choose(compare(), config) == expected
    new_process()  # another process: what failed may do so no longer
    monkeypatch.setattr(measure, "measure", Measured(wins_from(1)))
    assert choose(compare(), config).kernel == "reference"


def test_without_memory_the_table_decides_and_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(comparison: Comparison, names: Any) -> Result:
        raise CannotMeasure("out of memory: 9 GiB needed, 1 GiB free")

    monkeypatch.setattr(measure, "measure", out_of_memory)
    assert (
        choose(compare(), config).kernel == "reference"
    )  # its table, which is empty, has nothing against it
    monkeypatch.setattr(type(kernels.get("reference")), "not_chosen_reasons", lambda self, problem: ["slow"])
    chosen = choose(compare(), config)
    note = "tune=measure: out of memory: 9 GiB needed, 1 GiB free (decided by the shipped table)"
    assert chosen.reasons == ("reference: slow", note)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "out of memory" in warnings[0].getMessage()


def test_under_graph_capture_only_what_is_known_counts(
    measured: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_gpu(comparison: Comparison) -> Comparison:
        def moved(tensor: TensorSpec) -> TensorSpec:
            return replace(tensor, device=torch.device("cuda", 0))

        problem = comparison.problem
        tensors = {name: moved(getattr(problem, name)) for name in ("query", "key", "value")}
        return replace(comparison, problem=replace(problem, **tensors))

    capturing = True
    monkeypatch.setattr(kernels, "AUTO_DEVICE_TYPES", ("cuda",))
    monkeypatch.setattr(choice, "machine", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(type(kernels.get("reference")), "not_chosen_reasons", lambda self, problem: ["slow"])
    site = on_a_gpu(compare())
    times = measured(constant(sdpa=1.0, reference=0.5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU to measure on" in choose(site, config).reasons[-1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "a CUDA graph is being captured" in choose(site, config).reasons[-1]
    assert times.calls == []
    capturing = False
    assert choose(site, config).kernel == "reference"
    capturing = True
    assert choose(site, config).kernel == "reference" and len(times.calls) == 1


def test_table_and_off_measure_nothing(
    measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = measured(constant(sdpa=1.0, reference=2.0))
    folder = str(tmp_path)
    monkeypatch.setattr(type(kernels.get("reference")), "not_chosen_reasons", lambda self, problem: ["slow"])
    assert choose(compare(), Config(tune="table", cache_dir=folder)) == Choice(None, ("reference: slow",))
    assert choose(compare(), Config(tune="off", cache_dir=folder)) == Choice("reference")
    assert choose(compare(), Config(kernel="reference", cache_dir=folder)) == Choice("reference")
    assert times.calls == [] and list(tmp_path.iterdir()) == []


# Symbolic lengths.


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def nhd(seq: int, heads: int = 2, dim: int = 32) -> Tensor:
    return torch.randn(1, seq, heads, dim).transpose(1, 2)


def rewritten(config: Config, *inputs: Tensor, dynamic: tuple[int, ...] = ()) -> tuple[Site, str, Any]:
    """The site of `attend`, its graph, and the compiled function; the sequences of inputs `dynamic` are symbolic."""
    backend = RewritingBackend(config)
    for index in dynamic:
        torch._dynamo.mark_dynamic(inputs[index], 2)
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    compiled(*inputs)
    (site,) = backend.sites
    return site, graph_text(backend.graphs[0].graph), compiled


def wins_from(crossover: int) -> Model:
    """SDPA takes 1 ms for a square of 1000 tokens, the kernel the same at `crossover`."""
    return lambda name, q_len, kv_len: q_len * kv_len / 1e6 if name == "sdpa" else (
        q_len * kv_len / 2e6 + (q_len + kv_len) * crossover / 4e6
    )  # fmt: skip


@pytest.mark.parametrize(
    ("crossover", "hint", "least", "lengths"),
    [
        (300, 1000, 384, [1000, 512, 256, 384]),  # wins at the hint: from the last length at which it does
        (1900, 1000, 2048, [1000, 1024, 2048, 1536]),  # wins beyond the hint
        (10, 1000, 128, [1000, 512, 256, 128]),  # nothing shorter is worth a measurement
        (9000, 1000, None, [1000, 1024, 2048, 4096 - 96][:3]),
    ],
)
def test_symbolic_lengths_get_the_crossover(
    crossover: int, hint: int, least: int | None, lengths: list[int], measured: Any, config: Config
) -> None:
    times = measured(wins_from(crossover))
    q, k, v = nhd(hint), nhd(hint), nhd(hint)
    site, text, _ = rewritten(config, q, k, v, dynamic=(0, 1, 2))
    assert [q_len for q_len, _ in times.calls] == lengths
    assert site.rewritten == (least is not None) and site.speedup is not None
    assert (f"min_q_len={least}, min_kv_len={least}" in text) == (least is not None)


def test_only_the_symbolic_length_is_dispatched(measured: Any, config: Config) -> None:
    times = measured(wins_from(300))
    site, text, _ = rewritten(config, nhd(1000), nhd(300), nhd(300), dynamic=(0,))
    assert site.rewritten and "min_q_len=384" in text and "min_kv_len" not in text
    assert {kv_len for _, kv_len in times.calls} == {300}


def test_static_lengths_carry_no_crossover(measured: Any, config: Config) -> None:
    measured(constant(sdpa=1.0, reference=0.5))
    site, text, _ = rewritten(config, nhd(100), nhd(100), nhd(100))
    assert site.rewritten and site.speedup == 2.0 and "min_" not in text


def test_other_hints_find_the_crossover_measured(measured: Any, config: Config) -> None:
    times = measured(wins_from(300))
    for hint in (1000, 1001, 900):
        torch.compiler.reset()  # the times are still known
        q, k, v = nhd(hint), nhd(hint), nhd(hint)
        rewritten(config, q, k, v, dynamic=(0, 1, 2))
    assert [q_len for q_len, _ in times.calls] == [1000, 512, 256, 384]


def test_lengths_are_dispatched_without_recompiling(measured: Any, config: Config) -> None:
    measured(wins_from(300))
    q, k, v = nhd(1000), nhd(1000), nhd(1000)
    _, text, compiled = rewritten(config, q, k, v, dynamic=(0, 1, 2))
    assert "min_q_len=384, min_kv_len=384" in text
    with torch.compiler.set_stance("fail_on_recompile"):
        for seq in (50, 383, 384, 700):
            q, k, v = nhd(seq), nhd(seq), nhd(seq)
            error = relative_l2(compiled(q, k, v), attend(q, k, v))
            assert error < 1e-6 if seq < 384 else 1e-4 < error < 0.06, (seq, error)


def test_the_table_has_a_crossover_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Any, problem: AttentionProblem) -> list[str]:
        return [] if problem.key.shape[2] >= 600 else [f"kv_len={problem.key.shape[2]}"]

    monkeypatch.setattr(type(kernels.get("reference")), "not_chosen_reasons", short)
    q, k, v = nhd(1000), nhd(1000), nhd(1000)
    _, text, _ = rewritten(Config(tune="table"), q, k, v, dynamic=(0, 1, 2))
    assert "min_q_len=756, min_kv_len=756" in text  # half way between 512, which loses, and the hint


def test_lengths_without_a_hint_are_judged_at_one(measured: Any, config: Config) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    length: Any = ShapeEnv().create_unbacked_symint()
    tensor = TensorSpec((1, 8, length, 64), (length * 512, length * 64, 64, 1), torch.bfloat16, CPU)
    problem = AttentionProblem(tensor, tensor, tensor, None, AttentionParams())
    times = measured(wins_from(3000))
    chosen = choose(Comparison(problem, SdpaCall(tensor, tensor, tensor, None, False, None, False)), config)
    assert times.calls[0] == (4096, 4096)
    assert (chosen.kernel, chosen.min_q_len, chosen.min_kv_len) == ("reference", 4096, 4096)


def test_no_memory_for_longer_lengths_ends_the_search(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(comparison: Comparison, names: Any) -> Result:
        if comparison.lengths[0] > 2048:
            raise CannotMeasure("out of memory")
        return Measured(wins_from(3000))(comparison, names)

    monkeypatch.setattr(measure, "measure", limited)
    q, k, v = nhd(1000), nhd(1000), nhd(1000)
    site, _, _ = rewritten(config, q, k, v, dynamic=(0, 1, 2))
    assert not site.rewritten and "measured" in site.reasons[0]


# In graphs.


def test_many_equal_sites_one_measurement(measured: Any, config: Config) -> None:
    def deep(x: Tensor) -> Tensor:
        for _ in range(30):
            x = F.scaled_dot_product_attention(x, x, x)
        return x

    times = measured(constant(sdpa=1.0, reference=0.5))
    backend = RewritingBackend(config)
    torch.compile(deep, backend=backend)(nhd(64))
    assert len(backend.sites) == 30 and all(site.speedup == 2.0 for site in backend.sites)
    assert len(times.calls) == 1


def test_what_stays_for_another_reason_is_not_measured(measured: Any, config: Config) -> None:
    times = measured(constant(sdpa=1.0, reference=0.5))
    backend = RewritingBackend(replace(config, exclude=("*",)))
    torch.compile(attend, backend=backend)(nhd(64), nhd(64), nhd(64))
    assert not backend.sites[0].rewritten and times.calls == []


def test_a_planned_site_is_measured_and_run_in_its_precision(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = nhd(1000), nhd(1000), nhd(1000)
    plan = calibrate(attend, inputs, tolerance=0.03, effect="none")
    assert plan.decisions() == {"<root>": "balanced"}
    times, precisions = Measured(wins_from(300)), set()

    def spy(comparison: Comparison, names: list[str]) -> Result:
        precisions.add(comparison.problem.params.precision)
        return times(comparison, names)

    monkeypatch.setattr(measure, "measure", spy)
    site, text, _ = rewritten(replace(config, plan=plan), *inputs, dynamic=(0, 1, 2))
    assert precisions == {"balanced"} and site.precision == "balanced" and site.rel_l2 is not None
    assert site.speedup is not None
    assert "min_kv_len=384, or_exact=True, kernel_name='reference', precision='balanced')" in text


def test_sdpa_is_timed_as_the_graph_calls_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask that became is_causal, and the heads that a kernel reads unrepeated."""

    def llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(64, 64, dtype=torch.bool).tril()
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    seen: list[Comparison] = []

    def spy(comparison: Comparison, names: Any) -> Result:
        seen.append(comparison)
        return Result(*comparison.lengths, 1.0, {"reference": Timing(0.5, 0.5, 0.0)})

    monkeypatch.setattr(measure, "measure", spy)
    backend = RewritingBackend(config)
    torch.compile(llama, backend=backend)(nhd(64, heads=4), nhd(64), nhd(64))
    (comparison,) = seen
    problem, sdpa = comparison.problem, comparison.sdpa
    assert problem.attn_mask is None and problem.params.is_causal and problem.key.shape[1] == 2
    assert sdpa.attn_mask is not None and sdpa.attn_mask.shape == (64, 64)
    assert not sdpa.is_causal and sdpa.key.shape[1] == 4 and not sdpa.enable_gqa


CACHED = """
import os, sys, torch, torch._inductor.compile_fx, torch.nn.functional as F
from torch._dynamo.utils import counters
from sage_inductor import Config, enabled, kernels
from sage_inductor.tuning import measure
from sage_inductor.tuning.store import Result, Timing
kernels.AUTO_DEVICE_TYPES, kernels.AUTO_ORDER = ("cpu",), ("reference",)
type(kernels.get("reference")).not_chosen_reasons = lambda self, problem: ["slow"]
def measured(comparison, names):
    if how == "no memory":
        raise measure.CannotMeasure("out of memory")
    return Result(*comparison.lengths, 1.0, {"reference": Timing(0.5, 0.5, 0.0)})
measure.measure = measured
for how in sys.argv[2:]:
    if os.fork() > 0:  # each is a process of its own, which has imported what it needs
        assert os.wait()[1] == 0
        continue
    torch.manual_seed(0)
    q = torch.randn(1, 2, 16, 32)
    with torch.no_grad(), enabled(Config(cache_dir=sys.argv[1])):
        # A graph that no other test has.
        out = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.21875).relu())(q)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    exact = F.scaled_dot_product_attention(q, q, q, scale=0.21875).relu()
    print(hits, torch.allclose(out, exact, atol=1e-5), flush=True)
    os._exit(0)
"""


def test_a_choice_for_want_of_memory_is_not_cached(tmp_path: Path) -> None:
    """Inductor's cache would hold what the pass made of the table; the pass does not run where it hits."""
    command = [sys.executable, "-c", CACHED, str(tmp_path / "times"), "no memory", "memory", "memory"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third = map(str.split, done.stdout.splitlines())
    assert first == ["0", "True"]  # exact
    assert second == ["0", "False"]  # quantised
    assert third[0] != "0"


def test_the_uuid_knows_where_the_choice_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_inductor import SageAttentionPass
    from sage_inductor.rewriting import graph_pass

    places = [], [MACHINE], [replace(MACHINE, driver="580.2")]
    measured, table = set(), set()
    for place in places:
        monkeypatch.setattr(graph_pass, "machines", lambda: place)
        measured.add(str(SageAttentionPass().uuid()))
        table.add(str(SageAttentionPass(Config(tune="table")).uuid()))
    assert len(measured) == len(places) and len(table) == 1
