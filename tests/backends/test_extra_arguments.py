"""Arguments that hosts pass to every backend: used, ignored for a known reason, or named in a warning once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from sage_inductor import NotEligibleError
from sage_inductor.backends import SageAttentionBackend, SDPABackend

BACKENDS = [SageAttentionBackend, SDPABackend]


def make(backend: Any, **extra: Any) -> Any:
    return backend.get_impl_cls()(2, 32, False, None, None, "blocks.0.attn", **extra)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_argument_is_named_once_and_changes_nothing(backend: Any) -> None:
    with pytest.warns(UserWarning, match="window_size=128 is not used .valid: ") as caught:
        impl = make(backend, window_size=128)
        make(backend, window_size=64)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="sliding"):
        make(backend, sliding=1)
    x = torch.randn(1, 16, 2, 32)
    assert torch.equal(impl.forward(x, x, x), make(SDPABackend).forward(x, x, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_arguments_are_silent(backend: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(backend, dropout_p=0.0, dropout_rate=None, rope_type="neox", nvfp4_fa4=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_unknown_ones_are_all_named(backend: Any) -> None:
    with pytest.warns(UserWarning) as caught:
        make(backend, first=1, second=2)
    assert ["first" in str(item.message) or "second" in str(item.message) for item in caught] == [True, True]


def test_those_that_are_known_are_checked_beside_unknown_ones() -> None:
    with pytest.warns(UserWarning, match="host"), pytest.raises(ValueError, match="kernel='other'"):
        make(SageAttentionBackend, host=1, kernel="other")
    with pytest.raises(NotEligibleError, match="dropout_p"):
        make(SageAttentionBackend, dropout_p=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_takes_what_fastvideo_hands_to_every_builder(backend: Any) -> None:
    builder = backend.get_builder_cls()()
    builder.prepare()
    mask = torch.ones(1, 16, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metadata = builder.build(current_timestep=3, attn_mask=mask, VSA_sparsity=0.5)
    assert metadata == backend.get_metadata_cls()(3, mask, VSA_sparsity=0.5)
    with pytest.warns(
        UserWarning, match="build: raw_latent_shape is not used .valid: current_timestep"
    ) as caught:
        builder.build(current_timestep=3, raw_latent_shape=(1, 2, 3))
        builder.build(current_timestep=4, raw_latent_shape=(1, 2, 3))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert metadata.asdict_zerocopy({"attn_mask"}) == {
        "current_timestep": 3,
        "is_causal": False,
        "VSA_sparsity": 0.5,
    }
    x = torch.randn(1, 16, 2, 32)
    assert torch.equal(make(backend).forward(x, x, x, metadata), make(SDPABackend).forward(x, x, x))
