"""diffusers' context parallelism on the registered backend: ring and Ulysses, on two processes of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="a build without distributed")

RANKS = """
import os, sys, torch, torch._inductor.compile_fx, torch.distributed as dist, torch.nn.functional as F
folder = sys.argv[1]
# A CPU counts as no accelerator, and diffusers divides by their number.
torch.accelerator.device_count = lambda: 2

from diffusers import ContextParallelConfig, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from sage_inductor import Config, NotEligibleError, backend
from sage_inductor.integrations import diffusers as sage
from sage_inductor.testing import relative_l2

child = os.fork()  # after the imports, which take longer than the rest
rank = 0 if child else 1
dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)

# Graphs run as they were rewritten, without Inductor.
graphs = []
def run_eagerly(graph_module, *args):
    graphs.append(graph_module)
    return graph_module.forward
backend.compile_with_inductor = run_eagerly
torch.set_grad_enabled(False)
sage.register(Config(kernel="reference"))
sage.register(Config(kernel="reference", wires="8-bit"), name="in_8_bits")

def operators():
    return [node.target.__name__ for graph in graphs for node in graph.graph.nodes if "sage_inductor" in str(node.target)]

def wan():
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64,
        num_layers=1,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 24, 32), "return_dict": False,
    }

def flux():
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 12, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]), "img_ids": torch.randn(64, 3),
        "txt_ids": torch.zeros(12, 3), "return_dict": False,
    }

def build(make):
    torch.manual_seed(0)
    model, inputs = make()
    return model.eval(), inputs

configs = {}
for name in (wan, flux):
    model, inputs = build(name)
    model.set_attention_backend("native")  # setting one also makes it the default of later models
    exact = model(**inputs)[0]
    model.set_attention_backend("sage_inductor")
    alone = model(**inputs)[0]
    # Flux in a ring: tests/distributed/test_four_ranks.py.
    for way in ("ring", "ulysses") if name is wan else ("ulysses",):
        model, inputs = build(name)
        model.set_attention_backend("sage_inductor")
        config = ContextParallelConfig(**{way + "_degree": 2})
        model.enable_parallelism(config=config)
        configs[way] = next(m.processor._parallel_config for m in model.modules() if hasattr(m, "processor"))
        eager = model(**inputs)[0]
        assert 0 < relative_l2(eager, exact) < 2 * relative_l2(alone, exact) < 0.01, (name, way)
        graphs.clear()
        compiled = torch.compile(model, backend="sage_inductor", options={"sage.kernel": "reference"})(**inputs)[0]
        assert relative_l2(compiled, eager) < 1e-3, (name, way, relative_l2(compiled, eager))
        # The text of Wan is whole on each rank: its cross-attention is no matter of the ranks.
        assert operators().count(f"attention_of_{way}.default") == (1 if name is wan else 2), operators()
        if name is wan:  # keys and values travel in 8 bits
            model.set_attention_backend("in_8_bits")
            again = model(**inputs)[0]
            assert 0 < relative_l2(again, exact) < 1.1 * relative_l2(eager, exact), (name, relative_l2(again, exact))
            graphs.clear()
            fast = torch.compile(model, backend="sage_inductor", options={"sage.kernel": "reference"})(**inputs)[0]
            assert relative_l2(fast, again) < 1e-3, (name, relative_l2(fast, again))
            assert operators().count(f"attention_of_{way}.default") == 1, operators()
        sizes = [torch.empty_like(eager) for _ in range(2)]
        dist.all_gather(sizes, eager)
        assert torch.equal(*sizes), "ranks differ"

# Masks: over a rank's own keys or over all, where the ring of diffusers itself would apply the first part's to each part.
torch.manual_seed(1)
q, k, v = (torch.randn(2, 64, 2, 64) for _ in range(3))
keep = torch.ones(2, 64, dtype=torch.bool)
keep[0, 20:] = False  # nothing to attend for it on rank 1, which a ring merges as NaN
keep[1, 50:] = False
exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), keep[:, None, None]).transpose(1, 2)
part = slice(32 * rank, 32 * rank + 32)
local = [x[:, part].contiguous() for x in (q, k, v)]
additive = torch.zeros(2, 1, 1, 64).masked_fill(~keep[:, None, None], float("-inf"))
masks = {
    "own keys, 2-D": keep[:, part], "own keys, 4-D": keep[:, None, None, part], "additive": additive[..., part],
    "all keys": keep[:, None, None], "by query": keep[:, None, None].expand(2, 1, 32, 64),
}
for way in ("ring", "ulysses"):
    for kind, mask in masks.items():
        if way == "ulysses" and kind == "by query":
            continue
        def attend(q, k, v, mask):
            return dispatch_attention_fn(q, k, v, mask, backend="sage_inductor", parallel_config=configs[way])
        for call in (attend, torch.compile(attend, backend="eager", fullgraph="own" not in kind)):
            if call is not attend and kind not in ("own keys, 2-D", "all keys"):
                continue
            out = call(*local, mask)
            assert out.isfinite().all(), (way, kind)
            assert 0 < relative_l2(out, exact[:, part]) < 0.04, (way, kind, relative_l2(out, exact[:, part]))

def refused(error, text, *args, backend="sage_inductor", ways=("ring", "ulysses"), **kwargs):
    for way in ways:
        try:
            dispatch_attention_fn(*args, backend=backend, parallel_config=configs[way], **kwargs)
        except error as raised:
            assert text in str(raised), raised
        else:
            return False
    return True
assert refused(ValueError, "(valid: [batch, 1, 1, 32]", *local, keep[:, None, part, None].expand(2, 1, 32, 32))
assert refused(NotEligibleError, "dropout_p=0.5", *local, dropout_p=0.5)
assert refused(NotEligibleError, "attn_mask=given (supported: none with wires", *local, keep, backend="in_8_bits")
assert refused(NotEligibleError, "is_causal=True (supported: False with wires", *local, is_causal=True, backend="in_8_bits", ways=["ulysses"])
exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
for way, config in configs.items():
    def in_8_bits(q, k, v):
        return dispatch_attention_fn(q, k, v, backend="in_8_bits", parallel_config=config)
    torch._dynamo.reset()
    whole = torch.compile(in_8_bits, backend="eager", fullgraph=True)(*local)
    assert torch.equal(whole, in_8_bits(*local)) and whole.stride() == local[0].stride()
    assert 0 < relative_l2(whole, exact[:, part]) < 0.04, way
causal = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
out = dispatch_attention_fn(*local, is_causal=True, backend="sage_inductor", parallel_config=configs["ulysses"])
assert 0 < relative_l2(out, causal[:, part]) < 0.04
with torch.enable_grad():
    assert refused(NotEligibleError, "requires_grad", local[0].clone().requires_grad_(), *local[1:])
dist.barrier()
if child:
    assert os.waitpid(child, 0)[1] == 0, "rank 1 failed"
    print("well")
"""


def test_ring_and_ulysses_on_two_ranks(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )  # fmt: skip
    assert done.stdout.endswith("well\n"), done.stderr[-4000:]
