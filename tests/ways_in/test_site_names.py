"""One model, wrapped and compiled in every usual way: include, exclude and plans mean the same sites in all of them."""

from __future__ import annotations

import functools
import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_inductor import Config, Plan, calibrate, enabled, explain
from sage_inductor.measurement.metrics import relative_l2
from sage_inductor.report.site import Site
from sage_inductor.rewriting.driver import rewrite_graph

pytestmark = pytest.mark.usefixtures("inference")

BLOCKS = 3
Compile = Callable[[Any], Any]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn2(self.attn1(x)) + x


class Model(nn.Module):
    _repeated_blocks = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Holder(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def by_block(model: nn.Module, compiled: Compile) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=compiled)
    return model


def replaced_blocks(model: nn.Module, compiled: Compile) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=compiled)
    return model


def with_hooks(model: nn.Module) -> nn.Module:
    """Hooks as diffusers' offloading and parallelism register them: forward functions are replaced."""
    hooks = pytest.importorskip("diffusers.hooks")

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    for block in model.blocks:
        hooks.HookRegistry.check_if_exists_or_initialize(block).register_hook(Hook(), "test")
    return model


def wrapped_forward(model: nn.Module) -> nn.Module:
    """As in transformers 5.24: the model reaches its forward function as an argument of a wrapper."""

    class Wrapped(type(model)):  # type: ignore[misc]
        pass

    forward = type(model).forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    Wrapped.forward = wrapper
    model.__class__ = Wrapped
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return model


def regions(model: nn.Module) -> nn.Module:
    class Region(Block):
        forward = torch.compiler.nested_compile_region(Block.forward)

    for block in model.blocks:
        block.__class__ = Region
    return model


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module, compiled: Compile) -> Any:
    return torch.compile(model, backend=compiled)


DDP = nn.parallel.DistributedDataParallel
WAYS: dict[str, Callable[[nn.Module, Compile], Any]] = {
    "whole": whole,
    "forward alone": lambda m, c: setattr(m, "forward", torch.compile(m.forward, backend=c)) or m,
    "a function": lambda m, c: torch.compile(lambda x: m(x), backend=c),
    "block.compile()": by_block,
    "blocks replaced": replaced_blocks,
    "fully_shard": lambda m, c: whole(fsdp(m), c),
    "DDP outside": lambda m, c: DDP(whole(m, c)),
    "DDP inside": lambda m, c: whole(DDP(m), c),
    "compiled twice": lambda m, c: whole(Holder(whole(m, c)), c),
    "unknown wrapper": lambda m, c: whole(Holder(m), c),
    "hooks": lambda m, c: whole(with_hooks(m), c),
    "hooks, by block": lambda m, c: by_block(with_hooks(m), c),
    "forward wrapped": lambda m, c: whole(wrapped_forward(m), c),
    "checkpoints": lambda m, c: whole(checkpointed(m), c),
    "regions": lambda m, c: whole(regions(m), c),
}
NEED_GROUP = ("fully_shard", "DDP outside", "DDP inside")
BY_BLOCK = ("block.compile()", "blocks replaced", "fully_shard", "hooks, by block", "regions")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    if request.param in NEED_GROUP:
        request.getfixturevalue("group")
    return request.param


def make_x() -> Tensor:
    return torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(1))


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


class Backend:
    """Rewrites, and runs eagerly."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sites: list[Site] = []

    def __call__(self, graph_module: Any, example_inputs: Any) -> Any:
        self.sites += rewrite_graph(graph_module.graph, self.config)
        graph_module.recompile()
        return graph_module.forward


def decisions(way: str, **options: Any) -> dict[str, str]:
    """What every module of the model runs, by its name in the model alone."""
    torch.compiler.reset()
    backend = Backend(Config(kernel="reference", **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*record_function.*")
        result = WAYS[way](make_model(), backend)(make_x())
    torch.compiler.reset()
    assert relative_l2(result, make_model()(make_x())) < 0.02  # attention is a part of the output
    return {
        path.removeprefix("inner."): site.precision if site.rewritten else "sdpa"
        for site in backend.sites
        for path in site.serves
    }


def named(**kinds: str) -> dict[str, str]:
    return {f"blocks.{index}.{name}": kind for index in range(BLOCKS) for name, kind in kinds.items()}


# Slow: either of the two that the last has together.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"exclude": ("*.attn2",)}, marks=pytest.mark.slow),
        {"exclude": ("Block.attn2",)},
        pytest.param({"include": ("blocks.*.attn1",)}, marks=pytest.mark.slow),
        {"include": ("blocks.*",), "exclude": ("blocks.?.attn2",)},
    ],
    ids=str,
)
def test_globs_mean_the_same_in_every_way(way: str, options: Any) -> None:
    assert decisions(way, **options) == named(attn1="fast", attn2="sdpa")


def test_one_block_of_several_that_share_code_decides_for_all(way: str) -> None:
    """Dynamo runs the code of the first block for all: they stay where one may not be rewritten."""
    one = named(attn1="fast", attn2="fast") | dict.fromkeys(("blocks.1.attn1", "blocks.1.attn2"), "sdpa")
    none = named(attn1="sdpa", attn2="sdpa")
    assert decisions(way, exclude=("blocks.1.*",)) == (none if way in BY_BLOCK else one)
    only = none | dict.fromkeys(("blocks.0.attn1", "blocks.0.attn2"), "fast")
    assert decisions(way, include=("blocks.0.*",)) == (none if way in BY_BLOCK else only)


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    with torch.no_grad():
        return calibrate(Model().eval(), (make_x(),), effect="none")


def edited(plan: Plan, **decided: str) -> Plan:
    """With these decisions, by the last part of the name, or by all of it with "_" for "."."""
    import dataclasses

    def of(name: str) -> str:
        return decided.get(name.replace(".", "_"), decided.get(name.rpartition(".")[2], "fast"))

    return dataclasses.replace(
        plan, sites=tuple(dataclasses.replace(site, decision=of(site.name)) for site in plan.sites)
    )


def test_a_plan_means_the_same_in_every_way(way: str, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    expected = named(attn1="balanced", attn2="sdpa")
    assert decisions(way, plan=edited(plan, attn1="balanced", attn2="sdpa")) == expected
    assert not [record for record in caplog.records if record.name.startswith("sage_inductor")]


def test_blocks_that_share_code_take_the_most_careful_precision(way: str, plan: Plan) -> None:
    careful = edited(plan, attn1="fast", blocks_1_attn1="accurate", blocks_2_attn1="balanced")
    expected = named(attn1="accurate", attn2="fast")
    if way not in BY_BLOCK:
        expected |= {"blocks.0.attn1": "fast", "blocks.2.attn1": "balanced"}
    assert decisions(way, plan=careful) == expected


@pytest.mark.parametrize("made", ["block.compile()", "fully_shard", "DDP inside", "unknown wrapper", "hooks"])
def test_a_plan_made_in_one_way_serves_the_model_alone(
    made: str, group: None, caplog: pytest.LogCaptureFixture
) -> None:
    models: dict[str, Callable[[], nn.Module]] = {
        "block.compile()": lambda: by_block(make_model(), Backend(Config())),
        "fully_shard": lambda: fsdp(make_model()),
        "DDP inside": lambda: DDP(make_model()),
        "unknown wrapper": lambda: Holder(make_model()),
        "hooks": lambda: with_hooks(make_model()),
    }
    caplog.set_level("WARNING")
    plan = calibrate(models[made](), (make_x(),), effect="none")
    assert len(plan.sites) == 2 * BLOCKS
    for way in ("whole", "block.compile()"):
        assert set(decisions(way, plan=edited(plan, attn1="balanced", attn2="sdpa")).values()) == {
            "balanced",
            "sdpa",
        }
    assert not [record for record in caplog.records if record.name.startswith("sage_inductor")]


def test_attention_modules_that_are_sharded_one_by_one(group: None) -> None:
    """Even attn1 and attn2 may run one code: what holds for one of them holds for both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = make_model(), init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block.attn1, mesh=mesh)
        fully_shard(block.attn2, mesh=mesh)
    backend = Backend(Config(kernel="reference", exclude=("*.attn2",)))
    torch.compile(model, backend=backend)(make_x())
    (site,) = backend.sites
    assert site.name == "blocks.0.attn1" and len(site.serves) == 2 * BLOCKS
    assert site.reasons == ("site=blocks.0.attn1 (exclude: *.attn2; blocks.0.attn2 runs the same code)",)


def test_a_block_that_is_called_alone_is_known_by_its_class_and_the_ends_of_globs() -> None:
    def rewritten(**options: Any) -> list[bool]:
        torch.compiler.reset()
        backend = Backend(Config(kernel="reference", **options))
        torch.compile(Block(), backend=backend)(make_x())
        assert [site.name for site in backend.sites] == ["attn1", "attn2"]
        return [site.rewritten for site in backend.sites]

    for glob in ("*.attn2", "blocks.*.attn2", "Block.attn2", "attn2", "model.blocks.7.attn2"):
        assert rewritten(exclude=(glob,)) == [True, False], glob
    for glob in ("blocks.*.attn1", "Block.attn1", "*.attn1"):
        assert rewritten(include=(glob,)) == [True, False], glob


# What matches nothing


def unmatched(way: str, **options: Any) -> list[str]:
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WAYS[way](make_model(), Backend(Config(kernel="reference", **options)))(make_x())
    return [str(w.message) for w in caught if "sage_inductor" in str(w.message)]


def test_what_matches_nothing_warns_once_with_the_sites_there_are(way: str) -> None:
    (message,) = unmatched(way, exclude=("*.attn3", "*.attn2"), include=("*",))
    assert "exclude='*.attn3' matched no attention" in message and "blocks.0.attn1" in message
    (message,) = unmatched(way, include=("layers.*", "mid.*"))
    assert "include='layers.*', include='mid.*'" in message
    assert unmatched(way, include=("blocks.*",)) == []


def test_a_plan_for_another_model_warns(way: str, plan: Plan) -> None:
    import dataclasses

    sites = tuple(dataclasses.replace(site, name=f"layers.{i}.mha") for i, site in enumerate(plan.sites))
    (message,) = unmatched(way, plan=dataclasses.replace(plan, sites=sites))
    assert "plan (its sites: layers.0.mha" in message and "blocks.0.attn" in message


def test_a_glob_that_matches_modules_without_attention() -> None:
    """In a graph that is the whole model nothing can come that it would match; elsewhere explain() tells at its end."""
    (message,) = unmatched("whole", exclude=("*.qkv",))
    assert "exclude='*.qkv' matched no attention" in message
    assert unmatched("block.compile()", exclude=("*.qkv",)) == []
    config = Config(kernel="reference", exclude=("*.qkv",))
    report = explain(make_model(), make_x(), config=config, regional=("Block",))
    assert "exclude='*.qkv' matched no attention" in str(report) and report.unmatched in report.to_html()
    with pytest.warns(UserWarning, match="matched no attention"):
        calibrate(make_model(), (make_x(),), effect="none", config=Config(exclude=("*.qkv",)))


def test_a_glob_for_what_follows_a_graph_break_does_not_warn() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0].attn1(x)
            torch._dynamo.graph_break()
            return self.blocks[0].attn2(x)

    for glob in ("*.attn1", "*.attn2"):
        backend = Backend(Config(kernel="reference", exclude=(glob,)))
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            torch.compile(Broken(), backend=backend)(make_x())
        assert {site.name: site.rewritten for site in backend.sites} == {
            "blocks.0.attn1": glob != "*.attn1",
            "blocks.0.attn2": glob != "*.attn2",
        }


# explain(), and caches


@pytest.mark.parametrize("regional", [True, ("Block",), (Block,), ["Block", "Attention"]])
def test_explain_shows_what_regional_compilation_shares(regional: Any) -> None:
    model = make_model()
    report = explain(model, make_x(), config=Config(kernel="reference"), regional=regional)
    assert report.graphs == 1
    assert [site.name for site in report.sites] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert report.sites[0].serves == ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
    assert report.sites[0].title == "blocks.0.attn1 and 2 more"
    assert '"places": [' in report.to_json()
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_explain_names_what_regional_cannot_be() -> None:
    with pytest.raises(
        ValueError, match=r"regional=\('Blok',\) names no module \(classes that repeat: Block,"
    ):
        explain(make_model(), make_x(), regional=("Blok",))
    with pytest.raises(ValueError, match="regional=True names no module"):
        explain(Block(), make_x(), regional=True)
    with pytest.raises(ValueError, match="regional=True"):
        explain(lambda x: x, make_x(), regional=True)
    with pytest.raises(TypeError, match="regional='Block'"):
        explain(make_model(), make_x(), regional="Block")
    with pytest.raises(TypeError, match=r"regional=3 \(valid: True, False, a tuple"):
        explain(make_model(), make_x(), regional=3)
    with pytest.raises(TypeError, match=r"dynamic='yes' \(valid: True, False, None\)"):
        explain(make_model(), make_x(), dynamic="yes")
    with pytest.raises(TypeError, match="model is a NoneType"):
        explain(None, make_x())


def test_explain_takes_dynamic() -> None:
    static, dynamic = (explain(make_model(), make_x(), dynamic=value) for value in (False, True))
    assert all(isinstance(size, int) for size in static.sites[0].query.shape)
    assert any(isinstance(size, str) for size in dynamic.sites[0].query.shape)


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_a_cached_graph_of_a_block_serves_no_place_with_another_decision(order: Any) -> None:
    """The block's graph is the same in both models."""

    class Parent(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, make_model().blocks[0])
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule(self.name)(x)

    exact = make_model().blocks[0](make_x())
    for name in order:
        torch.compiler.reset()
        parent = Parent(name)
        parent.get_submodule(name).compile()
        config = Config(kernel="reference", exclude=(f"{order[0]}.*",))
        with enabled(config):
            error = relative_l2(parent(make_x()), exact)
        assert (error < 1e-5) == (name == order[0]), name


def test_what_a_caller_deletes_is_freed_before_it_returns() -> None:
    """Places are named after the first arguments of the functions on the stack."""

    def caller(x: Tensor) -> None:
        model = Attention()
        gone = weakref.ref(model)
        exec("written = 1")
        explain(model, x)
        del model
        gc.collect()
        assert gone() is None
        assert sys.version_info >= (3, 13) or locals()["written"] == 1

    caller(torch.randn(1, 16, 64))


def test_variables_that_a_caller_looks_at_stay() -> None:
    def caller(x: Tensor) -> None:
        model, variables = Attention(), locals()
        explain(model, x)
        assert variables["x"] is x

    caller(torch.randn(1, 16, 64))
