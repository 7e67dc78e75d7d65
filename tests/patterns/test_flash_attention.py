"""FlashAttention's own operators: found and right, or left alone with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flash_operators
import pytest
import torch
from expecttest import assert_expected_inline
from flash_operators import exact
from torch import Tensor

from sage_inductor import Config, Site, calibrate, explain
from sage_inductor.graph.call import Standing
from sage_inductor.patterns import flash_attention
from sage_inductor.testing import RewritingBackend, capture, graph_text, max_error, relative_l2
from sage_inductor.tuning import choice as choosing
from sage_inductor.tuning import choose

flash_operators.register()
pytestmark = pytest.mark.usefixtures("inference")

CONFIG = Config(kernel="reference", precision="accurate")
BOUND = 0.03  # a wrong mask, scale or order of heads gives above .2
Form = Callable[..., Any]


def fa2(
    causal: bool = False, left: int = -1, right: int = -1, scale: float = 0.2, build: str = "flash_attn"
) -> Form:
    operator = getattr(torch.ops, build)._flash_attn_forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operator(
            q, k, v, 0.0, scale, causal=causal, window_size_left=left, window_size_right=right, softcap=0.0,
            alibi_slopes=None, return_softmax=False,
        )  # fmt: skip

    return attend


def fa3(
    causal: bool = False, left: int = -1, right: int = -1, scale: float = 0.2, build: str = "flash_attn_3"
) -> Form:
    operator = getattr(torch.ops, build)._flash_attn_forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operator(
            q, k, v, softmax_scale=scale, causal=causal, window_size_left=left, window_size_right=right
        )

    return attend


def fa3_fwd(
    causal: bool = False, left: int = -1, right: int = -1, scale: float = 0.2, build: str = "flash_attn_3"
) -> Form:
    operator = getattr(torch.ops, build).fwd

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operator(
            q, k, v, softmax_scale=scale, is_causal=causal, window_size_left=left, window_size_right=right
        )

    return attend


def xformers(causal: bool = False, left: int = -1, right: int = -1, scale: float = 0.2) -> Form:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.ops.xformers_flash.flash_fwd(
            q, k, v, None, None, None, q.shape[1], k.shape[1], 0.0, scale, causal, left, right, False, None
        )

    return attend


FORMS = {"fa2": fa2, "fa3": fa3, "fa3_fwd": fa3_fwd, "xformers": xformers}
# Other builds of the same sources: the wheel fa3-fwd, which a GPU's machine has itself, and the hub's kernels.
BUILDS = [
    ("_flash_attn2_cuda_1a2b3c", fa2),
    ("_flash_attn3_cuda_1a2b3c_dirty", fa3),
    ("fa3_fwd", fa3),
    ("fa3_fwd", fa3_fwd),
]


def inputs(q_len: int = 24, kv_len: int = 24, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, q_len, 4, 32), *(torch.randn(2, kv_len, kv_heads, 32) for _ in range(2))


def run(function: Form, *args: Tensor, **options: Any) -> tuple[Any, list[Site], torch.fx.Graph]:
    backend = RewritingBackend(CONFIG)
    result = torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    (graph,) = backend.graphs
    return result, backend.sites, graph.graph


def flash_nodes(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "flash" in str(node.target)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lengths", "options", "mask"),
    [
        ((24, 24), {}, "none"),
        ((24, 24), {"causal": True}, "causal"),
        ((9, 24), {"causal": True}, "causal bottom-right"),
        ((24, 9), {"causal": True}, "causal bottom-right"),
        ((24, 24), {"left": 5, "causal": True}, "sliding_window left=5 right=0"),
        ((9, 24), {"left": 5, "right": 3}, "band left=5 right=3 bottom-right"),
        ((24, 24), {"left": 99, "right": 99}, "none"),
        ((24, 24), {"right": 2}, "band left=all right=2"),
    ],
)
def test_found_and_right(form: str, lengths: tuple[int, int], options: dict[str, Any], mask: str) -> None:
    """Grouped heads, causality that ends at the last key, windows: output, strides, and nothing left of the operator."""
    attend, args = FORMS[form](**options), inputs(*lengths)
    result, sites, graph = run(lambda *tensors: attend(*tensors)[0], *args)
    (site,) = sites
    assert (site.pattern, site.mask, site.rewritten) == ("flash_attention", mask, True), site.reasons
    assert flash_nodes(graph) == []
    expected = attend(*args)[0]
    assert relative_l2(result, expected) < BOUND and max_error(result, expected) < 0.1
    assert result.stride() == expected.stride() and result.dtype == expected.dtype


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_lse_is_given_where_it_is_read(form: str, causal: bool) -> None:
    attend, args = FORMS[form](causal), inputs(9, 24)
    (out, lse), (site,), graph = run(lambda *tensors: attend(*tensors)[:2], *args)
    assert site.rewritten and flash_nodes(graph) == []
    expected = attend(*args)
    assert relative_l2(out, expected[0]) < BOUND
    assert (lse - expected[1]).abs().max() < 0.05 and lse.stride() == expected[1].stride()


@pytest.mark.parametrize(("build", "form"), BUILDS)
def test_builds_under_another_name(build: str, form: Form) -> None:
    if build not in flash_operators.SCHEMAS:
        pytest.skip("the wheel fa3-fwd is installed: a GPU runs it below")
    attend, args = form(causal=True, build=build), inputs(9, 24)
    (out, lse), (site,), graph = run(lambda *tensors: attend(*tensors)[:2], *args)
    assert (site.mask, site.rewritten, flash_nodes(graph)) == ("causal bottom-right", True, [])
    expected = attend(*args)
    assert relative_l2(out, expected[0]) < BOUND and (lse - expected[1]).abs().max() < 0.05
    # The name of another operator of such a package, or of a package that begins so.
    for other in (
        "_flash_attn2_cuda_1a2b3c::fwd_kvcache",
        "_flash_attn4_cuda_1a2b3c::fwd",
        "fa3_fwd_other::fwd",
    ):
        assert flash_attention._known_as(other) not in flash_attention.OPERATORS


def test_the_operator_of_diffusers() -> None:
    """diffusers' backend "_flash_3", whose own operator calls flash-attn 3 and says less of its LSE than it gives."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

    flash_operators.give_diffusers_a_kernel()
    for causal, scale in ((True, None), (False, 0.2)):
        attend = partial(dispatch._flash_attention_3, is_causal=causal, scale=scale)
        args = inputs(kv_heads=4)
        result, (site,), graph = run(lambda *tensors, attend=attend: attend(*tensors), *args)
        assert (site.mask, site.rewritten, flash_nodes(graph)) == ("causal" if causal else "none", True, [])
        expected = attend(*args)
        assert relative_l2(result, expected) < BOUND and result.stride() == expected.stride()
    reads_lse = partial(dispatch._flash_attention_3, return_lse=True)
    assert stays(lambda *tensors: reads_lse(*tensors), *args).startswith("softmax_lse=read of diffusers' own")


@pytest.mark.parametrize("form", FORMS)
def test_memory_in_the_order_of_the_heads(form: str) -> None:
    """`empty_like(q)` keeps the order of q: models turn `[batch, heads, seq, dim]` before they call it."""
    attend = FORMS[form]()
    args = tuple(torch.randn(2, 4, 24, 32).transpose(1, 2) for _ in range(3))
    result, (site,), _ = run(lambda *tensors: attend(*tensors)[0], *args)
    expected = attend(*args)[0]
    assert site.rewritten and result.stride() == expected.stride() and not result.is_contiguous()
    assert relative_l2(result, expected) < BOUND


def test_golden() -> None:
    attend = fa2(causal=True, left=5)
    graph = capture(lambda q, k, v: attend(q, k, v)[0].flatten(2), *inputs())
    RewritingBackend(CONFIG)(graph, ())
    assert_expected_inline(
        graph_text(graph.graph),
        """\
a = input: 2x24x4x32
b = input: 2x24x2x32
c = input: 2x24x2x32
d = .transpose(a, 1, 2): 2x4x24x32
e = .transpose(b, 1, 2): 2x2x24x32
f = .transpose(c, 1, 2): 2x2x24x32
g = sage_inductor.attention(d, e, f, is_causal=True, scale=0.2, enable_gqa=True, window_left=5, kernel_name='reference', precision='accurate'): 2x4x24x32
h = .transpose(g, 1, 2): 2x24x4x32
i = .flatten(h, 2): 2x24x128
return (i)""",
    )


def test_lengths_that_change() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 0.2, True, -1, -1, 0.0, None, False
        )[0]
        return out

    backend = RewritingBackend(CONFIG)
    compiled = torch.compile(attend, backend=backend, dynamic=True)
    for length in (24, 33):
        args = inputs(length, length, kv_heads=4)
        assert relative_l2(compiled(*args), attend(*args)) < BOUND
    (site,) = backend.sites
    assert site.rewritten and site.mask.startswith("causal") and len(backend.graphs) == 1, site.reasons


def stays(function: Form, *args: Tensor) -> str:
    """The reasons; the result is that of eager."""
    result, sites, graph = run(function, *args)
    (site,) = sites
    assert not site.rewritten and site.pattern == "flash_attention" and len(flash_nodes(graph)) == 1
    expected = function(*args)
    results = result if isinstance(result, tuple) else (result,)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    assert all(map(torch.equal, results, wanted))
    return "; ".join(site.reasons)


def fa2_with(**changed: Any) -> Form:
    def attend(q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> Tensor:
        given: dict[str, Any] = {
            "dropout_p": 0.0, "softmax_scale": 0.2, "causal": True, "window_size_left": -1, "window_size_right": -1,
            "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
        }  # fmt: skip
        out: Tensor = torch.ops.flash_attn._flash_attn_forward(q, k, v, **{**given, **changed})[0]
        return out

    return attend


def test_what_no_kernel_computes_stays() -> None:
    args = inputs()
    assert stays(fa2_with(softcap=30.0), *args) == "softcap=30.0 (supported: 0; no kernel here caps scores)"
    assert stays(fa2_with(dropout_p=0.5), *args).startswith("dropout_p=0.5")
    assert stays(fa2_with(return_softmax=True), *args) == "return_softmax=True (supported: False)"

    def with_slopes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        out: Tensor = fa2_with(alibi_slopes=slopes)(q, k, v)
        return out

    assert stays(with_slopes, *args, torch.rand(4)).startswith(
        "alibi_slopes=a tensor (supported: None; as a mask"
    )


def test_caches_stay() -> None:
    q, k, v = inputs()
    lengths = torch.tensor([24, 20], dtype=torch.int32)

    def appended(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
        out: Tensor = torch.ops.flash_attn_3.fwd(q, k, v, k_new=k, v_new=v, seqused_k=used, is_causal=True)[0]
        return out

    reasons = stays(appended, q, k, v, lengths)
    assert "k_new=a tensor (supported: None; a cache that is paged or appended to" in reasons
    assert "seqused_k=a tensor" in reasons


def test_what_a_backward_pass_reads_stays() -> None:
    attend = fa2()
    reasons = stays(lambda *tensors: attend(*tensors)[::3], *inputs())
    assert reasons == "read=what belongs to a backward pass (supported: the output and its LSE)"


class WithGradient(torch.autograd.Function):
    """As flash-attn 3 wraps its operator: what it saves is its output and its LSE."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = torch.ops.flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.2, causal=True)[:2]
        ctx.save_for_backward(out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # not attention's: what it reads shows
        out, lse = ctx.saved_tensors
        return grad * lse.transpose(1, 2)[..., None], None, grad * out


@pytest.mark.parametrize("training", [False, True])
def test_with_gradients_it_stays(training: bool) -> None:
    """Its backward pass would take quantised values for exact ones, whatever is asked for."""
    backend = RewritingBackend(Config(kernel="reference", training=training))
    compiled = torch.compile(lambda *tensors: WithGradient.apply(*tensors), backend=backend)
    args = [tensor.requires_grad_() for tensor in inputs(kv_heads=4)]
    with torch.enable_grad():
        results = []
        for function in (compiled, WithGradient.apply):
            out = function(*args)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), (args[0], args[2]))))
    assert all(map(torch.equal, *results))
    (site,) = backend.sites
    assert site.reasons == ("requires_grad=inputs (supported: none; torch.no_grad())",)


def test_an_lse_of_queries_that_see_no_key_stays() -> None:
    """FlashAttention gives inf there, our operator -inf."""
    attend = fa2(causal=True)
    reasons = stays(lambda *tensors: attend(*tensors)[:2], *inputs(24, 9))
    assert reasons.startswith("softmax_lse=read where queries may see no key")


def test_an_output_that_two_read_is_rewritten_once() -> None:
    attend = fa2()

    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(q, k, v)[0]
        return out.sum(-1), out * 2

    args = inputs()
    result, sites, graph = run(twice, *args)
    assert len(sites) == 1 and sites[0].rewritten and flash_nodes(graph) == []
    assert relative_l2(result[1], twice(*args)[1]) < BOUND


def test_a_kernel_has_to_beat_the_operator_that_stands_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not SDPA, with which the shipped tables compare."""
    seen: list[Any] = []
    real = choose

    def choosing_for(comparison: Any, config: Config, *rest: object) -> Any:
        seen.append(comparison)
        return real(comparison, config, *rest)

    from sage_inductor.rewriting import decision

    monkeypatch.setattr(decision, "choose", choosing_for)
    attend, args = fa2(causal=True), inputs()
    run(lambda *tensors: attend(*tensors)[0], *args)
    (comparison,) = seen
    assert comparison.sdpa.name == "flash_attn::_flash_attn_forward"
    assert comparison.key()["sdpa"]["standing"] == "flash_attn::_flash_attn_forward"
    heads_first = [tensor.transpose(1, 2) for tensor in args]
    assert torch.equal(comparison.sdpa.standing.run(*heads_first)[0], attend(*args)[0])
    # On a GPU whose kernels may not be measured, nothing says that one is faster.
    monkeypatch.setattr(choosing.kernels, "no_choice_reasons", lambda problem: [])
    monkeypatch.setattr(
        choosing.kernels, "candidates", lambda problem: ([choosing.kernels.get("reference")], {})
    )
    choice = choose(comparison, Config(tune="table"))
    text = "tune=table: the shipped table compares with SDPA, not with flash_attn::_flash_attn_forward"
    assert choice.kernel is None and choice.reasons[0] == text
    assert Standing("one", print) == Standing("one", repr)


def test_it_is_timed_where_it_stands() -> None:
    """On a CPU the clock is the host's: the operator is called, and the reference kernel beside it."""
    from sage_inductor.kernels import AttentionParams, AttentionProblem, TensorSpec
    from sage_inductor.tuning import Comparison, SdpaCall
    from sage_inductor.tuning.measure import measure

    calls: list[tuple[int, ...]] = []
    spec = TensorSpec.of(torch.empty(1, 16, 2, 32).transpose(1, 2))
    standing = Standing("theirs", lambda q, k, v: calls.append(tuple(q.stride())))
    problem = AttentionProblem(spec, spec, spec, None, AttentionParams(precision="fast"))
    sdpa = SdpaCall(spec, spec, spec, None, False, None, False, standing)
    result = measure(Comparison(problem, sdpa), ["reference"])
    assert set(calls) == {spec.stride} and result.kernels["reference"].ratio > 1


def test_report_and_calibration_know_it() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = fa2(causal=True)(q, k, v)[0]
            return out

    report = explain(Model(), *inputs(), config=CONFIG)
    assert [site.rewritten for site in report.sites] == [True] and report.operators == ()
    closed = explain(fa2_with(softcap=30.0), *inputs(), config=CONFIG)
    assert closed.operators == () and not closed.sites[0].rewritten
    plan = calibrate(Model(), [inputs()], tolerance=0.05)
    (decision,) = plan.decisions().values() if hasattr(plan, "decisions") else ()
    assert decision is not None


def test_the_operators_of_the_tests_are_attention() -> None:
    """A window of one key, and the first one alone, are known."""
    q, k, v = inputs(4, 4, 4)
    assert torch.allclose(exact(q, k, v, True, 0, -1, 0.2)[0], v)
    out, lse = exact(q, k, v, True, -1, -1, 0.2)
    assert torch.allclose(out[:, 0], v[:, 0])
    assert torch.allclose(lse[..., 0], (0.2 * q[:, 0] * k[:, 0]).sum(-1))


class WithTheWheel(torch.nn.Module):
    """What a user of fa3-fwd writes: projections around its function."""

    def __init__(self, causal: bool, reads_lse: bool, kv_heads: int) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(128, 4 * 64), torch.nn.Linear(128, 2 * kv_heads * 64)
        self.causal, self.reads_lse, self.kv_heads = causal, reads_lse, kv_heads

    def inputs(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.kv(context).unflatten(-1, (2, self.kv_heads, 64)).unbind(2)
        return self.q(x).unflatten(-1, (4, 64)), key, value

    def forward(self, x: Tensor, context: Tensor) -> Any:
        from fa3_fwd_interface import flash_attn_func

        return flash_attn_func(*self.inputs(x, context), causal=self.causal, return_attn_probs=self.reads_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("reads_lse", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("causal", "lengths"), [(False, (300, 333)), (True, (300, 300)), (True, (77, 333))])
def test_the_real_wheel(causal: bool, lengths: tuple[int, int], kv_heads: int, reads_lse: bool) -> None:
    """fa3-fwd's function in a compiled model: found, gone from the graph, its values those of float64, its strides."""
    pytest.importorskip("fa3_fwd_interface")
    model = WithTheWheel(causal, reads_lse, kv_heads).cuda().bfloat16().eval()
    args = tuple(torch.randn(2, length, 128, device="cuda", dtype=torch.bfloat16) for length in lengths)
    config = Config(kernel="triton", precision="accurate")
    backend = RewritingBackend(config)
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    (site,), (graph,) = backend.sites, backend.graphs
    mask = "none" if not causal else "causal" if lengths[0] == lengths[1] else "causal bottom-right"
    assert (site.pattern, site.mask, site.rewritten) == ("flash_attention", mask, True), site.reasons
    assert [str(node.target) for node in graph.graph.nodes if "fa3_fwd" in str(node.target)] == []

    torch._dynamo.reset()
    options = {"sage.kernel": "triton", "sage.precision": "accurate"}
    result = torch.compile(model, backend="sage_inductor", options=options, fullgraph=True)(*args)
    theirs = model(*args)
    expected = exact(*(tensor.cpu() for tensor in model.inputs(*args)), causal, -1, -1, None)
    if not reads_lse:
        result, theirs = (result,), (theirs,)
    assert result[0].dtype == torch.bfloat16 and relative_l2(theirs[0].cpu(), expected[0]) < 0.008
    assert relative_l2(result[0].cpu(), expected[0]) < BOUND
    for one, of in zip(result, theirs, strict=False):
        assert one.stride() == of.stride() and one.shape == of.shape and one.dtype == of.dtype
    if reads_lse:
        assert (result[1].cpu() - expected[1]).abs().max() < 0.05


@pytest.mark.gpu
def test_the_real_wheel_has_the_schemas_of_the_tests() -> None:
    """Those that operators of the same names have in the tests for CPUs, but for the package's name."""
    pytest.importorskip("fa3_fwd_interface")
    for name in ("fwd", "_flash_attn_forward"):
        real, ours = (
            str(getattr(getattr(torch.ops, of), name).default._schema) for of in ("fa3_fwd", "flash_attn_3")
        )
        assert real.partition("::")[2] == ours.partition("::")[2]


@pytest.mark.gpu
def test_the_operator_behind_the_wheel_is_as_plain() -> None:
    """`torch.ops.fa3_fwd.fwd` says nothing of its output's shape to a compiler: it runs between graphs, as in plain torch.compile."""
    pytest.importorskip("fa3_fwd_interface")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.fa3_fwd.fwd(q * 2, k, v, softmax_scale=0.2, is_causal=True)[0] + 1

    args = [torch.randn(2, 100, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    results = []
    for backend in ("inductor", "sage_inductor"):
        torch._dynamo.reset()
        results.append(torch.compile(attend, backend=backend)(*args))
    assert torch.equal(*results)
