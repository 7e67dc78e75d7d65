"""The models of benchmarks/distributed.py, and how each is divided among the ranks. Weights are random, the same on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import llama_prefill  # noqa: E402
import wan_video  # noqa: E402
from comparison import cast  # noqa: E402
from several_gpus import spread as divide  # noqa: E402

from sage_inductor.config import Wires  # noqa: E402

# What diffusers' ring needs of plain attention, the log-sum-exp, "native" does not give. On a CPU nothing plain gives it.
PLAIN_RING = "_native_cudnn"
# Our backends of diffusers, by how keys and values travel; distributed.py registers them.
BACKENDS: dict[Wires, str] = {"inputs": "sage_inductor", "8-bit": "sage_inductor_8_bit_wires"}
SEQ = 1  # of `[batch, seq]` token ids, and of an output `[batch, seq, channels]`


@dataclass(frozen=True)
class Spread:
    """How many ranks share what: heads by all-to-alls (Ulysses), keys and values in a ring, or weights (tensor parallel). Keys and
    values of ours travel as `wires` says."""

    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    wires: Wires = "inputs"

    def __str__(self) -> str:
        if self.ulysses > 1 and self.ring > 1:
            return f"USP {self.ulysses}x{self.ring}"
        for name, ranks in (("Ulysses", self.ulysses), ("ring", self.ring), ("TP", self.tensor)):
            if ranks > 1:
                return f"{name} {ranks}" + (", 8-bit wires" if self.wires == "8-bit" else "")
        return "one GPU"


def spreads(ranks: int) -> list[Spread]:
    """Every way for so many ranks, one GPU first."""
    found = [Spread()]
    if ranks > 1:
        within = [size for size in range(2, ranks) if ranks % size == 0]
        for wires in BACKENDS:
            found += [Spread(ulysses=ranks, wires=wires), Spread(ring=ranks, wires=wires)]
        found += [Spread(ulysses=size, ring=ranks // size) for size in within]
        found.append(Spread(tensor=ranks))
    return found


@dataclass(frozen=True)
class Prepared:
    """A model that is divided, as plain torch.compile gets it and as ours does."""

    plain: nn.Module
    ours: nn.Module
    inputs: dict[str, Any]
    mine: Callable[[Tensor], Tensor]
    """This rank's part of the output of one GPU."""
    inside: AbstractContextManager[Any]
    """In which it is compiled and called."""


class Workload(Protocol):
    model: str
    layers: int
    tokens: int

    def not_supported(self, spread: Spread) -> str | None:
        """Why there is no such division of this model; None where there is."""

    def prepare(self, spread: Spread, device: str, dtype: torch.dtype) -> Prepared: ...


def _reason(what: str, size: int, ranks: int) -> str | None:
    return f"{what}={size} (valid: a multiple of {ranks})" if size % ranks else None


@dataclass(frozen=True)
class Video:
    """A video transformer of diffusers, whose context parallelism divides it."""

    model: str
    layers: int
    tokens: int
    heads: int
    build: Callable[[str, torch.dtype], tuple[Any, dict[str, Any]]]
    adapt: Callable[[Any], None] = lambda model: None
    """What the model needs before it is divided."""
    plan: Callable[[], dict[str, Any]] | None = None

    def not_supported(self, spread: Spread) -> str | None:
        if spread.tensor > 1:
            return "diffusers has no tensor-parallel plan of this model"
        heads = _reason("heads", self.heads, spread.ulysses)
        return heads or _reason("tokens", self.tokens, spread.ulysses * spread.ring)

    def prepare(self, spread: Spread, device: str, dtype: torch.dtype) -> Prepared:
        with_lse = spread.ring > 1 and torch.device(device).type == "cuda"
        plain, inputs = self._divided(spread, PLAIN_RING if with_lse else "native", device, dtype)
        # One model where each rank attends for itself. Where ranks exchange keys and values the model calls our operator.
        alone = spread.ulysses == spread.ring == 1
        ours = plain if alone else self._divided(spread, BACKENDS[spread.wires], device, dtype)[0]
        return Prepared(plain, ours, inputs, lambda output: output, nullcontext())

    def _divided(
        self, spread: Spread, backend: str, device: str, dtype: torch.dtype
    ) -> tuple[Any, dict[str, Any]]:
        model, inputs = self.build(device, dtype)
        self.adapt(model)
        # Setting one also makes it the default of later models.
        model.set_attention_backend(backend)
        if spread != Spread():
            divide(model, spread.ulysses, spread.ring, self.plan() if self.plan else None)
            for module in getattr(model, "context_embedder", nn.Module()).modules():
                if hasattr(module, "processor"):  # the whole text is on every rank, until it is refined
                    module.processor._parallel_config = None
        return model, inputs


@dataclass(frozen=True)
class Prompt:
    """Llama reading a prompt. A ring is torch's `context_parallel`, which balances causal attention."""

    model: str
    layers: int
    tokens: int
    size: llama_prefill.Size

    def not_supported(self, spread: Spread) -> str | None:
        if spread.ulysses > 1 and spread.ring > 1:
            return "torch's context_parallel has no Ulysses within it"
        if spread.ulysses > 1 and spread.wires != "inputs":
            return "the Ulysses of this model is DTensor's, which sends inputs"
        shared = max(spread.ulysses, spread.tensor)
        # Every rank has two chunks in a balanced ring.
        return _reason("key heads", self.size.kv_heads, shared) or _reason(
            "tokens", self.tokens, 2 * spread.ring
        )

    def prepare(self, spread: Spread, device: str, dtype: torch.dtype) -> Prepared:
        whole, _ = llama_prefill.build(self.size, self.layers, 1, self.tokens, device, dtype)
        model: Any = whole.model
        model.set_attn_implementation(_attention_functions("ulysses" if spread.ulysses > 1 else "causal"))
        generator = torch.Generator(device).manual_seed(1)
        ids = torch.randint(0, self.size.vocabulary, (1, self.tokens), device=device, generator=generator)
        places = torch.arange(self.tokens, device=device)[None]
        inside: AbstractContextManager[Any] = nullcontext()
        if spread.ulysses > 1:
            ids, places = (tensor.chunk(spread.ulysses, SEQ)[dist.get_rank()] for tensor in (ids, places))
        if spread.ring > 1:
            inside = _ring([ids, places])
        if spread.tensor > 1:
            _share_weights(model, device)
        inputs = {"input_ids": ids, "position_ids": places, "use_cache": False, "return_dict": False}
        return Prepared(model, model, inputs, lambda output: output[:, places[0]], inside)


@contextmanager
def _ring(buffers: list[Tensor]) -> Iterator[None]:
    """Inside, `buffers` are this rank's chunks, and attention rings."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel._attention import set_rotate_method

    set_rotate_method("alltoall")  # send on as each part is computed; by default all is gathered before
    mesh = init_device_mesh(buffers[0].device.type, (dist.get_world_size(),))
    if buffers[0].device.type == "cpu":
        _teach_rings_of_cpus()
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[SEQ] * len(buffers)):
        yield


def _teach_rings_of_cpus() -> None:
    """torch rings with its kernels of CUDA; here with that of the CPU, too, so that plain attention rings in small runs."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding
    from torch.distributed.tensor.experimental._context_parallel import _attention as rings

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    register_sharding(kernel.default)(
        lambda q, k, v, *args, **kwargs: [
            ([one] * 2, [one] * 3 + [None] * len(args)) for one in (Shard(0), Shard(1), Shard(2), Replicate())
        ]
    )

    def handle(operator: Any, args: Any, kwargs: Any) -> Any:
        dispatcher = DTensor._op_dispatcher
        info = dispatcher.unwrap_to_op_info(operator, args, kwargs)
        dispatcher.sharding_propagator.propagate(info)
        query, key, value, _, is_causal, *_ = (*info.local_args, 0.0, False)
        found = rings._templated_ring_attention(
            info.compute_mesh.get_group(),
            2,
            kernel,
            query,
            key,
            value,
            is_causal=is_causal,
            **info.local_kwargs,
        )
        return dispatcher.wrap(found, info.output_sharding.output_spec)

    rings.custom_ops[kernel.default] = handle


def _share_weights(model: Any, device: str) -> None:
    """Tensor parallelism with local outputs: each rank has some heads, and some channels of the feed-forward part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    by_columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    by_rows = ("self_attn.o_proj", "mlp.down_proj")
    for layer in model.layers:
        plan: dict[str, Any] = {name: ColwiseParallel() for name in by_columns}
        plan.update({name: RowwiseParallel() for name in by_rows})
        parallelize_module(layer, mesh, plan)


def _attention_functions(kind: str) -> str:
    """The name under which transformers finds attention of this kind. No mask is made: of 131,072 tokens it would be 17 GB, and
    no ring takes one. SDPA is told that it is causal."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = f"benchmark_{kind}"
    AttentionInterface.register(name, _ulysses if kind == "ulysses" else _causal)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def _causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def _ulysses(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Each rank's part of the sequence, of all heads, becomes the sequence, of this rank's heads; and back."""
    query, key, value = (_to_heads(tensor) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return _to_sequence(output), None


def _to_heads(tensor: Tensor) -> Tensor:
    """`[batch, heads, seq / ranks, dim]` to `[batch, heads / ranks, seq, dim]`. Ulysses: Jacobs et al. 2023."""
    batch, heads, seq, dim = tensor.shape
    ranks = dist.get_world_size()
    by_rank = tensor.unflatten(1, (ranks, heads // ranks)).permute(1, 3, 0, 2, 4).contiguous()
    received = _exchanged(by_rank)  # [ranks, seq / ranks, batch, heads / ranks, dim]
    return received.flatten(0, 1).permute(1, 2, 0, 3)


def _to_sequence(tensor: Tensor) -> Tensor:
    """`[batch, heads / ranks, seq, dim]` to `[batch, seq / ranks, heads, dim]`."""
    ranks = dist.get_world_size()
    by_rank = tensor.unflatten(2, (ranks, -1)).permute(2, 0, 3, 1, 4).contiguous()
    received = _exchanged(by_rank)  # [ranks, batch, seq / ranks, heads / ranks, dim]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchanged(by_rank: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import all_to_all_single

    return all_to_all_single(by_rank, None, None, dist.group.WORLD).view(by_rank.shape)


def wan(name: str, layers: int) -> Video:
    size = wan_video.SIZES[name]
    latents = frames, height, width = wan_video.LATENTS[size.resolution]
    tokens = frames * (height // 2) * (width // 2)
    return Video(
        f"Wan {name}", layers, tokens, size.heads, lambda *to: wan_video.build(size, latents, layers, *to)
    )


def hunyuan(name: str, heads: int, latents: tuple[int, int, int], text: int, **sizes: Any) -> Video:
    """HunyuanVideo: one block with text and video apart, and one with both together."""
    frames, height, width = latents

    def build(device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
        from diffusers import HunyuanVideoTransformer3DModel

        torch.manual_seed(0)
        with torch.device(device):
            model = HunyuanVideoTransformer3DModel(
                num_attention_heads=heads, num_layers=1, num_single_layers=1, **sizes
            )
            about = model.config
            inputs = {
                "hidden_states": torch.randn(1, about.in_channels, *latents, dtype=dtype),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, text, about.text_embed_dim, dtype=dtype),
                "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
                "pooled_projections": torch.randn(1, about.pooled_projection_dim, dtype=dtype),
                "guidance": torch.tensor([6000.0], dtype=dtype),
                "return_dict": False,
            }
        return cast(model, dtype), inputs

    def adapt(model: Any) -> None:
        """The prompt fills its tokens, so that the mask hides nothing. It would have a rank's own length, which no Ulysses
        takes, and keep plain attention off its fastest kernels."""

        def without_mask(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*args[:3], None, *args[4:])

        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.register_forward_pre_hook(without_mask)

    def plan() -> dict[str, Any]:
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        def divided(dim: int, dims: int) -> Any:
            return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True)

        return {
            "x_embedder": {0: divided(1, 3)},
            "context_embedder": {0: divided(1, 3)},
            "rope": {0: divided(0, 2), 1: divided(0, 2)},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    tokens = frames * (height // 2) * (width // 2) + text
    return Video(f"HunyuanVideo {name}", 2, tokens, heads, build, adapt, plan)


def llama(name: str, tokens: int, size: llama_prefill.Size) -> Prompt:
    return Prompt(f"Llama {name}", 2, tokens, size)


# 129 frames of 720 x 1280 are 33 latent ones of 90 x 160, and 118,800 tokens beside those of the text.
WORKLOADS: dict[str, Workload] = {
    "wan_14B": wan("14B", 2),
    "hunyuan": hunyuan("720p", 24, (33, 90, 160), 256),
    "llama_64k": llama("8B", 65536, llama_prefill.SIZES["8B"]),
    "llama_128k": llama("8B", 131072, llama_prefill.SIZES["8B"]),
}
TINY: dict[str, Workload] = {
    "wan": wan("tiny", 1),
    "hunyuan": hunyuan(
        "tiny", 2, (2, 16, 16), 16, attention_head_dim=32, rope_axes_dim=(8, 12, 12), in_channels=4, out_channels=4,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=16,
    ),
    "llama": llama("tiny", 256, llama_prefill.SIZES["tiny"]),
}  # fmt: skip
