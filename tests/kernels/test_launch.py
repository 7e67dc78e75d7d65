"""The host side of the Triton and Hopper kernels: what is worked out once must hold for every later call. Kernels and driver
are stand-ins that keep what they are launched with; on a GPU, at the end, the kernels themselves."""

from __future__ import annotations

import ctypes
import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from agreement import DEVICE
from torch import Tensor

from sage_inductor import kernels
from sage_inductor.kernels.base import AttentionParams
from sage_inductor.kernels.cache import Cache
from sage_inductor.kernels.triton import attention_varlen

triton = pytest.importorskip("triton")
launch = pytest.importorskip("sage_inductor.kernels.triton.launch")
launcher = pytest.importorskip("sage_inductor.kernels.triton.launcher")

NAMES = ("statistics_kernel", "quantize_kernel", "attention_kernel")
STREAM = 77

# By two launches that quantise, as the stand-ins expect.
Params = partial(AttentionParams, smoothing="mean")


def nhd(tokens: int = 200, heads: int = 2, dim: int = 64, shift: int = 0) -> Tensor:
    """`[1, heads, tokens, dim]` in NHD memory that begins `shift` elements after a multiple of 16 bytes."""
    storage = torch.randn(tokens * heads * dim + shift, device=DEVICE).bfloat16()
    return storage[shift:].view(1, tokens, heads, dim).transpose(1, 2)


# ------------------------------------------------------------------------------------------------- stand-ins


class Launcher36:
    """Takes what CudaLauncher of Triton 3.6 takes."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launch = launch

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any) -> None:  # noqa: N803
        self.launch(gridX, gridY, gridZ, stream, function, *args)


class Launcher37(Launcher36):
    def __call__(  # type: ignore[override]
        self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, kernel_metadata: Any,  # noqa: N803
        launch_metadata: Any, launch_enter_hook: Any, launch_exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        hooks = launch_metadata, launch_enter_hook, launch_exit_hook
        self.launch(gridX, gridY, gridZ, stream, function, kernel_metadata, *hooks, *args)


class Launcher39(Launcher37):
    """Descriptors are encoded otherwise there."""


class LauncherUnknown(Launcher36):
    def __call__(self, grid: Any, stream: int, *args: Any) -> None:  # type: ignore[override]
        raise AssertionError("nobody knows how to call this")


@dataclass
class Encoded:
    """A tensor descriptor as an argument."""

    address: int
    shape: list[int]
    block: list[int]
    number: int


@dataclass
class Stand:
    """For a kernel. Its own launches, with tensors, are `slow`; those of its binaries `fast`."""

    name: str
    arg_names: list[str]
    launcher: type[Launcher36]
    slow: list[tuple[Any, ...]] = field(default_factory=list)
    fast: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Binary]:
        def launch(*args: Any, **kwargs: Any) -> Binary:
            named = dict(zip(self.arg_names, args, strict=False))
            assert not named.keys() & kwargs.keys()
            self.slow.append((grid[0], named | {name: kwargs[name] for name in self.arg_names[len(args) :]}))
            return Binary(self, sum(type(arg).__name__ == "TensorDescriptor" for arg in args))

        return launch


class Binary:
    """For what `Stand` has compiled."""

    def __init__(self, stand: Stand, descriptors: int) -> None:
        self.stand, self.function, self.packed_metadata = stand, 4096, (4, 1, 0)
        self.metadata = SimpleNamespace(tensordesc_meta=list(range(descriptors)))

        def inner(*args: Any) -> None:
            launcher(*args)
            raise AssertionError("descriptors are encoded again")

        def launcher(*args: Any) -> None:
            programs, one, two, stream, function, metadata, *hooks = args[:9]
            assert (one, two, function, metadata, hooks) == (1, 1, 4096, (4, 1, 0), [None] * 3)
            stand.fast.append((programs, stream, args[9:]))

        self.run = stand.launcher(inner if descriptors else launcher)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream: self.stand.fast.append((grid[0], stream, args))


def encode(arg: Any, metadata: int) -> list[Any]:
    assert arg.strides == [arg.shape[1], 1]
    return [Encoded(arg.base.data_ptr(), arg.shape, arg.block_shape, metadata)]


def encode_39(arg: Any, metadata: int, _: Any) -> list[Any]:
    raise AssertionError("nobody knows how to call this")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Stand]]]:
    if DEVICE == "cuda":
        pytest.skip("on a GPU the kernels themselves are launched")
    import triton.backends.nvidia.driver as nvidia

    def make(arch: tuple[int, int] = (9, 0), kind: type[Launcher36] = Launcher37) -> list[Stand]:
        stands = [Stand(name, getattr(launch, name).arg_names, kind) for name in NAMES]
        for stand in stands:
            monkeypatch.setattr(launch, stand.name, stand)
        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setattr(launch, "capability", lambda index: arch)
        monkeypatch.setattr(launcher, "_binaries", {})
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        monkeypatch.setattr(nvidia, "make_tensordesc_arg", encode_39 if kind is Launcher39 else encode)
        active = SimpleNamespace(get_current_stream=lambda index: STREAM)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
        return stands

    return make


def counts(stands: list[Stand]) -> list[tuple[int, int]]:
    return [(len(stand.slow), len(stand.fast)) for stand in stands]


def plain(value: Any, workspace: int) -> Any:
    """An argument as its launch takes it: tensors by address, those of the workspace by where they lie in it."""
    if isinstance(value, Encoded):
        return value.address - workspace, value.shape, value.block
    if type(value).__name__ == "TensorDescriptor":
        return value.base.data_ptr() - workspace, value.shape, value.block_shape
    return value.data_ptr() if isinstance(value, Tensor) else value or 0


OWN = {"q8", "k8", "v8", "scales", *(f"{name}_tile{n}" for name in "qkv" for n in (0, 1))}


def same_launch(stand: Stand, slow: int, fast: int, workspaces: tuple[Tensor, Tensor]) -> None:
    """Launch `slow` as Triton does it and launch `fast` of a binary have the same arguments, each in its workspace."""
    programs, by_name = stand.slow[slow]
    again, stream, args = stand.fast[fast]
    assert (programs, STREAM) == (again, stream) and len(args) == len(stand.arg_names)
    old, new = (workspace.data_ptr() for workspace in workspaces)
    for name, value in zip(stand.arg_names, args, strict=True):
        expected, found = plain(by_name[name], old), plain(value, new)
        if name in OWN and isinstance(found, int) and found:
            expected, found = expected - old, found - new
        assert expected == found, name


# ---------------------------------------------------------------------------------------------- Triton's kernels


@pytest.mark.parametrize("kind", [Launcher36, Launcher37, Launcher39, LauncherUnknown])
@pytest.mark.parametrize("arch", [(9, 0), (8, 0)])
@pytest.mark.parametrize("dim", [64, 96])
def test_later_launches_have_the_arguments_of_the_first(
    stand_ins: Any, arch: tuple[int, int], kind: type[Launcher36], dim: int
) -> None:
    stands = stand_ins(arch, kind)
    q, k, v = (nhd(dim=dim) for _ in range(3))
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    out, lse = torch.empty_like(q), torch.empty(1, 2, 200)
    call = launch.TritonAttention(q, k, v, mask, Params(is_causal=True, precision="balanced"), out, lse)
    workspaces = []
    for _ in range(3):  # each elsewhere: all are kept
        workspaces.append(call.quantize(q, k, v, mask))
        call.attend(workspaces[-1], mask, out, lse)
    assert counts(stands) == [(1, 2)] * 3
    for stand in stands:
        for fast in (0, 1):
            same_launch(stand, 0, fast, (workspaces[0], workspaces[1 + fast]))


def test_parts_of_the_workspace_do_not_overlap(stand_ins: Any) -> None:
    stand_ins()
    for tokens in (1, 127, 128, 1000):
        q, k, v = nhd(tokens), nhd(tokens + 3), nhd(tokens + 3)
        call = launch.TritonAttention(q, k, v, None, Params(), q, None)
        end = 0
        for part in (call.q8, call.k8, call.v8, call.scales):
            assert part.offset % launch.PART_BYTES == 0 and part.offset >= end
            end = part.offset + part.elements * part.dtype.itemsize
        assert end <= call.workspace_bytes < end + launch.PART_BYTES


def test_addresses_that_are_not_aligned_get_a_form_of_their_own(stand_ins: Any) -> None:
    stands = stand_ins()
    aligned, shifted, out = nhd(), nhd(shift=1), nhd()
    assert aligned.data_ptr() % 16 == out.data_ptr() % 16 == 0 and shifted.data_ptr() % 16 == 2
    call = launch.TritonAttention(aligned, aligned, aligned, None, Params(), out, None)
    call(aligned, aligned, aligned, None, out, None)
    for _ in range(2):
        call(shifted, aligned, aligned, None, out, None)  # attention_kernel does not read it
        call(aligned, aligned, aligned, None, out, None)
    assert counts(stands) == [(2, 3), (2, 3), (1, 4)]
    call(aligned, aligned, aligned, None, nhd(shift=1), None)
    assert counts(stands) == [(2, 4), (2, 4), (2, 4)]
    addresses = [args[0] for _, _, args in stands[1].fast]
    assert addresses == [tensor.data_ptr() for tensor in (aligned, shifted, aligned, aligned)]


def test_other_lengths_find_what_is_compiled(stand_ins: Any) -> None:
    stands = stand_ins()
    for number, tokens in enumerate((200, 201, 1000)):
        q, k, v = nhd(tokens), nhd(tokens + 56), nhd(tokens + 56)
        call = launch.TritonAttention(q, k, v, None, Params(), q, None)
        call(q, k, v, None, q, None)
        assert counts(stands) == [(1, number)] * 3
    # The last stride is specialised on: 1, 2 or a multiple of 16.
    for number, step in enumerate((2, 16, 32, 3), 2):
        q = torch.randn(1, 200, 2, 64 * step).bfloat16().transpose(1, 2)[..., ::step]
        call = launch.TritonAttention(q, k, v, None, Params(), nhd(), None)
        call(q, k, v, None, nhd(), None)
        assert len(stands[1].slow) == min(number, 3), step
    assert counts(stands) == [(3, 4), (3, 4), (1, 6)]


def test_devices_and_variants_have_binaries_of_their_own(stand_ins: Any) -> None:
    stands = stand_ins()
    q = nhd()
    plain, causal = (
        launch.TritonAttention(q, q, q, None, Params(is_causal=is_causal), q, None)
        for is_causal in (False, True)
    )
    for call in (plain, causal, plain, causal):
        call(q, q, q, None, q, None)
    assert counts(stands) == [(1, 3), (1, 3), (2, 2)]
    for part in (plain.statistics, plain.quantization, plain.attention):
        part.index = 1
        part.binaries.clear()
    plain(q, q, q, None, q, None)
    assert counts(stands) == [(2, 3), (2, 3), (3, 2)]


def test_numbers_beyond_32_bits_are_left_to_triton(stand_ins: Any) -> None:
    stands = stand_ins()
    q = torch.zeros(2, 1, 1, 64).bfloat16()
    far = torch.empty_strided(q.shape, (2**31, 64, 64, 1), dtype=q.dtype, device="meta")
    call = launch.TritonAttention(far, q, q, None, Params(), q, None)
    for _ in range(2):
        call(q, q, q, None, q, None)
    assert counts(stands) == [(2, 0)] * 3


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_hear_of_every_launch(stand_ins: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stands = stand_ins()
    q = nhd()
    call = launch.TritonAttention(q, q, q, None, Params(), q, None)
    for _ in range(2):
        call(q, q, q, None, q, None)
    hook = getattr(triton.knobs.runtime, name)
    hook.add(print)
    try:
        call(q, q, q, None, q, None)
    finally:
        hook.remove(print)
    assert counts(stands) == [(2, 1)] * 3
    call(q, q, q, None, q, None)
    assert counts(stands) == [(2, 2)] * 3
    for hook in (print, None):  # set, as before there were chains
        monkeypatch.setattr(triton.knobs.runtime, name, hook)
        call(q, q, q, None, q, None)
    assert counts(stands) == [(3, 3)] * 3


def test_a_launch_that_a_hook_prevents_leaves_nothing(
    stand_ins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands = stand_ins()
    q = nhd()
    call = launch.TritonAttention(q, q, q, None, Params(), q, None)
    with monkeypatch.context() as patch:
        patch.setattr(Stand, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
        call(q, q, q, None, q, None)
    call(q, q, q, None, q, None)
    assert counts(stands) == [(1, 0)] * 3


def test_no_tensor_is_kept(stand_ins: Any) -> None:
    stands = stand_ins()
    tensors = [nhd() for _ in range(4)]
    call = launch.TritonAttention(*tensors[:3], None, Params(), tensors[3], None)
    for _ in range(2):
        call(*tensors[:3], None, tensors[3], None)
    seen = [weakref.ref(tensor) for tensor in tensors]
    for stand in stands:
        stand.slow.clear()
    del tensors
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4


def test_threads_share_a_call(stand_ins: Any) -> None:
    """Each launch has the addresses of one thread's tensors, and the tiles and scales of one workspace."""
    stands = stand_ins()
    q = nhd()
    call = launch.TritonAttention(q, q, q, None, Params(), q, None)
    call(q, q, q, None, q, None)
    sets = [[nhd() for _ in range(4)] for _ in range(8)]

    def work(tensors: list[Tensor]) -> None:
        for _ in range(50):
            call(*tensors[:3], None, tensors[3], None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, sets))
    assert counts(stands) == [(1, 400)] * 3
    inputs = {tuple(tensor.data_ptr() for tensor in tensors[:3]) for tensors in sets}
    assert {args[:3] for _, _, args in stands[1].fast} == inputs
    assert {args[1] for _, _, args in stands[2].fast} == {tensors[3].data_ptr() for tensors in sets}
    for _, _, args in stands[1].fast:
        starts = [
            address - part.offset
            for address, part in zip(args[6:10], (call.q8, call.k8, call.v8, call.scales), strict=True)
        ]
        assert len(set(starts)) == 1
    for _, _, args in stands[2].fast:
        assert {args[5].address - call.q8.offset, args[7].address - call.k8.offset} == {
            args[11] - call.scales.offset
        }


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU test of its own is below")
@pytest.mark.parametrize("precision", ["fast", "accurate"])
def test_prepared_calls_give_what_single_ones_give(precision: str) -> None:
    check_prepared("triton", Params(is_causal=True, precision=precision))


def check_prepared(name: str, params: AttentionParams) -> None:
    """One prepared call on tensors at other addresses, aligned and not, and with other values."""
    kernel = kernels.get(name)
    q, k, v = nhd(150), nhd(), nhd()
    lse = torch.empty(1, 2, 150, device=DEVICE)
    prepared = kernel.prepare(q, k, v, None, params, torch.empty_like(q), lse)
    for shift in (0, 1, 4, 0):
        q, k, v = nhd(150, shift=shift), nhd(shift=8 - shift), nhd(shift=shift)
        out, out_lse = nhd(150, shift=shift), torch.empty_like(lse)
        prepared(q, k, v, None, out, out_lse)
        single, single_lse = nhd(150, shift=shift), torch.empty_like(lse)
        kernel.run(q, k, v, None, params, single, single_lse)
        assert torch.equal(out, single) and torch.equal(out_lse, single_lse)


# -------------------------------------------------------------------------------------------------------- varlen


def test_varlen_calls_of_one_kind_are_prepared_once(stand_ins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sage_inductor.kernels.triton as family

    stands = stand_ins()
    monkeypatch.setattr(family, "_varlen_calls", Cache(2))
    attend = partial(attention_varlen, smoothing="mean")  # by two launches, as the stand-ins expect
    prepared: list[int] = []
    init = launch.TritonAttention.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.append(kwargs["varlen"][1])
        init(self, *args, **kwargs)

    monkeypatch.setattr(launch.TritonAttention, "__init__", counted)
    q, k, v = (torch.randn(300, 2, 64).bfloat16() for _ in range(3))
    cu = torch.tensor([0, 100, 300], dtype=torch.int32)
    for longest in (200, 200, 220, 220, 240, 200):
        attend(q, k, v, cu, cu, longest, 240)
    assert prepared == [200, 220, 240, 200]
    assert len(family._varlen_calls) == 2
    numbers = [args[stands[2].arg_names.index("q_len")] for _, _, args in stands[2].fast]
    assert numbers == [200, 220, 220, 240, 200]
    # Another output, and no longer without an LSE.
    buffer = torch.empty(300, 2, 80).bfloat16()[..., :64]
    prepared.clear()
    for _ in range(2):
        assert attend(q, k, v, cu, cu, 200, 240, out=buffer) is buffer
        attend(q, k, v, cu, cu, 200, 240, return_lse=True)
    assert prepared == [200, 200]
    with pytest.raises(ValueError, match=r"out: \(300, 2, 80\)"):
        attend(q, k, v, cu, cu, 200, 240, out=torch.empty(300, 2, 80).bfloat16())
    with pytest.raises(ValueError, match="cu_seqlens dtype"):
        attend(q, k, v, cu.long(), cu, 200, 240)


def test_caches_are_bounded() -> None:
    cache: Cache[int, str] = Cache(3)
    for number in range(7):
        assert cache.keep(number, str(number)) == str(number)
        assert len(cache) <= 3 and cache[number] == str(number)


# -------------------------------------------------------------------------------------------------------- Hopper


@dataclass
class Numbers:
    """One launch of the Hopper kernel."""

    function: str
    grid: tuple[int, int]
    maps: list[tuple[int, ...]]
    params: dict[str, int]


@pytest.fixture
def hopper(stand_ins: Any, monkeypatch: pytest.MonkeyPatch) -> list[Numbers]:
    """The launches of the Hopper kernel."""
    pytest.importorskip("cuda.bindings")
    from sage_inductor.kernels.hopper import driver
    from sage_inductor.kernels.hopper import launch as host

    stand_ins()
    launches: list[Numbers] = []
    maps: list[tuple[int, ...]] = []

    def tensor_map(*numbers: int) -> Any:
        maps.append(numbers)
        return SimpleNamespace(getPtr=lambda number=len(maps): number)

    def driver_launch(
        function: str, grid: tuple[int, int], threads: int, shared: int, stream: int, arguments: int, overlap: bool = False
    ) -> None:  # fmt: skip
        assert stream == STREAM
        time.sleep(0)  # lets other threads in
        is_combine = function == "combine"
        assert not (is_combine and overlap)  # it does not wait for the kernel in front
        pointers = (ctypes.c_void_p * (1 if is_combine else 4)).from_address(arguments)
        params = host._Params.from_address(pointers[-1])
        values = {name: getattr(params, name) or 0 for name, _ in host._Params._fields_}
        launches.append(Numbers(function, grid, [maps[number - 1] for number in pointers[:-1]], values))

    monkeypatch.setattr(driver, "tensor_map", tensor_map)
    monkeypatch.setattr(driver, "launch", driver_launch)
    monkeypatch.setattr(host, "loaded", lambda index, variant: ("attention", "combine"))
    monkeypatch.setattr(host, "multiprocessors", lambda index: 132)
    return launches


def test_hopper_gets_the_addresses_of_each_call(hopper: list[Numbers]) -> None:
    from sage_inductor.kernels.hopper.launch import HopperAttention

    q, k, v = (nhd(heads=4) for _ in range(3))
    mask, lse = torch.ones(1, 1, 1, 200, dtype=torch.bool), torch.empty(1, 4, 200)
    call = HopperAttention(q, k, v, mask, Params(), q, lse)
    kept = []
    for _ in range(3):
        out, mask, lse = nhd(heads=4), mask.clone(), lse.clone()
        workspace = call.quantize(q, k, v, mask)
        call.attend(workspace, mask, out, lse)
        kept.append((out, mask, lse, workspace))
    assert [numbers.function for numbers in hopper] == ["attention"] * 3
    for numbers, (out, mask, lse, workspace) in zip(hopper, kept, strict=True):
        start, params = workspace.data_ptr(), numbers.params
        assert [found[0] - start for found in numbers.maps] == [
            part.offset for part in (call.q8, call.k8, call.v8)
        ]
        assert [params[name] for name in ("out", "key_mask", "lse")] == [
            t.data_ptr() for t in (out, mask, lse)
        ]
        assert params["q_scale"] - start == call.scales.offset
        # `sections` of workspace.py, in the units of its docstring: 2 blocks of keys, 4 heads, 64 channels.
        rows, slots, means, channels = 2 * 4 * 2 * 128, 4 * 2, 4 * 64, 4 * 4 * 64
        offsets = {"k_scale": rows, "v_scale": rows + slots, "v_channel": rows + 2 * slots + means}
        offsets |= {"q_shift": rows // 2, "used_keys": offsets["v_channel"] + channels}
        offsets["ticket"] = offsets["used_keys"] + 5
        assert {name: (params[name] - params["q_scale"]) // 4 for name in offsets} == offsets
        assert 4 * (offsets["ticket"] + 1) == 4 * call.scales.elements
        assert [params[f"out_{dim}"] for dim in "bhm"] == list(out.stride()[:3]) and params["wide"] == 1
    assert call.numbers.out is None and call.numbers.q_scale is None  # shared by all


def test_hopper_copies_what_it_cannot_write_in_place(hopper: list[Numbers]) -> None:
    from sage_inductor.kernels.hopper.launch import HopperAttention

    q = nhd()
    call = HopperAttention(q, q, q, None, Params(), q, None)
    for shift, in_place, wide in ((0, True, 1), (2, True, 0), (1, False, 1), (0, True, 1)):
        out = nhd(shift=shift)
        call(q, q, q, None, out, None)
        params = hopper[-1].params
        assert (params["out"] == out.data_ptr()) == in_place, shift
        assert params["wide"] == wide, shift
        strides = out.stride() if in_place else torch.empty(out.shape).stride()
        assert [params[f"out_{dim}"] for dim in "bhm"] == list(strides[:3]), shift
    padded = torch.empty(1, 2, 200, 73).bfloat16()[..., :64]
    call = HopperAttention(q, q, q, None, Params(), padded, None)
    call(q, q, q, None, padded, None)
    assert hopper[-1].params["out"] != padded.data_ptr() and hopper[-1].params["out_m"] == 64


def test_hopper_parts_lie_in_the_workspace(hopper: list[Numbers]) -> None:
    from sage_inductor.kernels.hopper.launch import HopperAttention

    q, k = nhd(64), nhd(8192)
    call = HopperAttention(q, k, k, None, Params(), q, None)
    call(q, k, k, None, q, None)
    attention, combine = hopper
    assert (combine.function, combine.params) == ("combine", attention.params)
    rows = 2 * attention.params["grid"] * 128
    assert attention.params["units"] > 0 and attention.grid == (attention.params["grid"], 1)
    workspace = attention.params["q_scale"] - call.scales.offset
    parts, part_lse = (attention.params[name] - workspace for name in ("parts", "part_lse"))
    assert parts >= call.scales.offset + 4 * call.scales.elements
    assert part_lse >= parts + 4 * rows * 64
    assert call.workspace_bytes >= part_lse + 4 * rows


@pytest.mark.parametrize(
    ("precision", "dims", "span", "piece", "tiles"),
    [
        ("fast", (192, 256), 64, 128, 2),
        ("balanced", (136, 136), 64, 80, 2),
        ("accurate", (256, 64), 128, 64, 1),
        ("accurate", (160, 192), 64, 192, 1),
    ],
)
def test_hopper_cuts_wide_heads(
    hopper: list[Numbers], precision: str, dims: tuple[int, int], span: int, piece: int, tiles: int
) -> None:
    """Q and K into spans of their rows, V into pieces, each with tiles of its own."""
    from sage_inductor.kernels.hopper.launch import HopperAttention

    q, k = (torch.randn(1, heads, 8192, dims[0]).bfloat16() for heads in (2, 1))
    v, out = (torch.randn(1, heads, 8192, dims[1]).bfloat16() for heads in (1, 2))
    q, out = q[:, :, :64], out[:, :, :64]
    call = HopperAttention(q, k, v, None, Params(precision=precision), out, None)
    call(q, k, v, None, out, None)
    attention, combine = hopper
    d, dv, bytes_each = call.plan.d, call.plan.dv, 2 if precision == "accurate" else 1
    assert [numbers[1:] for numbers in attention.maps] == [
        (1, 2 * 128, d, 64, span, span),
        (1, 8192, d, 128, span, span),
        (bytes_each, dv, 8192, piece, 128 // bytes_each, 128),
    ]
    assert piece * tiles == dv
    assert attention.params["units"] == 2 * tiles * 64 and combine.grid == (2 * tiles, 8)
    rows = 2 * attention.params["grid"] * 128
    assert call.parts.elements == rows * piece and call.part_lse.elements == rows


def test_hopper_threads_have_numbers_of_their_own(hopper: list[Numbers]) -> None:
    from sage_inductor.kernels.hopper.launch import HopperAttention

    q = nhd()
    call = HopperAttention(q, q, q, None, Params(), q, None)
    call(q, q, q, None, q, None)
    outs = [nhd() for _ in range(8)]
    shared = call.quantize(q, q, q, None)

    def work(out: Tensor) -> None:
        for _ in range(50):
            call(q, q, q, None, out, None)
            call.attend(shared, None, out, None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, outs))
    found = [numbers.params["out"] for numbers in hopper[1:]]
    assert sorted(found) == sorted(out.data_ptr() for out in outs for _ in range(100))
    for numbers in hopper:
        assert numbers.maps[0][0] - call.q8.offset == numbers.params["q_scale"] - call.scales.offset


# ----------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "hopper"])
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def available(self, name: str) -> None:
        if reasons := kernels.available("cuda:0")[name]:
            pytest.skip("; ".join(reasons))

    @pytest.mark.parametrize("precision", ["fast", "balanced", "accurate"])
    def test_prepared_calls_give_what_single_ones_give(self, name: str, precision: str) -> None:
        check_prepared(name, Params(precision=precision))
        check_prepared(name, Params(is_causal=True, precision=precision))

    def test_profilers_hear_of_every_launch(self, name: str) -> None:
        q, k, v = (nhd() for _ in range(3))
        out, hooked = torch.empty_like(q), torch.empty_like(q)
        prepared = kernels.get(name).prepare(q, k, v, None, Params(), out, None)
        for _ in range(2):
            prepared(q, k, v, None, out, None)
        heard: list[str] = []

        def hear(metadata: Any) -> None:
            heard.append(metadata.get()["name"])

        hook = triton.knobs.runtime.launch_enter_hook
        hook.add(hear)
        try:
            prepared(q, k, v, None, hooked, None)
        finally:
            hook.remove(hear)
        assert heard == list(NAMES[: 3 if name == "triton" else 2]) and torch.equal(out, hooked)

    def test_threads_on_streams_of_their_own(self, name: str) -> None:
        params = Params()
        sets = [[nhd(1000, heads=4) for _ in range(3)] for _ in range(4)]
        kernel = kernels.get(name)
        expected = [torch.empty_like(q) for q, _, _ in sets]
        for (q, k, v), out in zip(sets, expected, strict=True):
            kernel.run(q, k, v, None, params, out, None)
        prepared = kernel.prepare(*sets[0], None, params, expected[0], None)
        torch.cuda.synchronize()

        def work(tensors: list[Tensor]) -> Tensor:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    out = torch.full_like(tensors[0], math.nan)
                    prepared(*tensors, None, out, None)
                torch.cuda.current_stream().synchronize()
            return out

        with ThreadPoolExecutor(4) as pool:
            outs = list(pool.map(work, sets))
        assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected, strict=True))

    def test_graph_of_a_prepared_call(self, name: str) -> None:
        """Its nodes keep copies of the arguments: calls after it, elsewhere, leave them as they are."""
        q, k, v = (nhd(500) for _ in range(3))
        out = torch.empty_like(q)
        prepared = kernels.get(name).prepare(q, k, v, None, Params(), out, None)
        prepared(q, k, v, None, out, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            prepared(q, k, v, None, out, None)
        for _ in range(3):
            others = [nhd(500) for _ in range(4)]
            prepared(*others[:3], None, others[3], None)
            for tensor in (q, k, v):
                tensor.normal_()
            expected = torch.empty_like(q)
            prepared(q, k, v, None, expected, None)
            out.fill_(math.nan)
            graph.replay()
            assert torch.equal(out, expected)
