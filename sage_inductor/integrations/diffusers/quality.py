"""What a pipeline's images or videos lose, measured on the finished output."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_inductor.measurement.metrics import compare

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputLoss:
    """A pipeline's output against that of the same run with exact attention. Of several images or videos the worst counts."""

    psnr_db: float
    """10 log10(range^2 / mean squared error); range is 1 for images, and for latents that of the exact ones. inf where equal."""
    rel_l2: float
    """||output - exact|| / ||exact||"""
    lpips: float | None
    """The distance of the package lpips (AlexNet), of the worst frame; None where it is not installed, or for latents."""
    lpips_missing: str = ""
    """Why lpips is None."""

    def __str__(self) -> str:
        lpips = f"none ({self.lpips_missing})" if self.lpips is None else f"{self.lpips:.4f}"
        return f"PSNR {self.psnr_db:.2f} dB, relative L2 {self.rel_l2:.3g}, LPIPS {lpips}"


def output_loss(output: Any, exact: Any) -> OutputLoss:
    """The loss of what a pipeline returned. Raises ValueError where there are no images, videos or latents in it, or where the
    two differ in number or shape."""
    pairs = list(zip(pictures(output), found := pictures(exact), strict=True))
    if not pairs:
        raise ValueError(
            f"a {type(exact).__name__} holds no images (valid: images, frames, arrays or tensors)"
        )
    ranges = [1.0 if _is_image(one) else float(one.max() - one.min()) for one in found]
    psnr = min(_psnr_db(one, of, size) for (one, of), size in zip(pairs, ranges, strict=True))
    lpips, missing = _lpips(pairs)
    return OutputLoss(psnr, max(compare(one, of).rel_l2 for one, of in pairs), lpips, missing)


def pictures(output: Any) -> list[Tensor]:
    """The images, videos or latents of an output, on the CPU in float32: images as `[height, width, channels]` in 0 to 1, other
    arrays and tensors as they are."""
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            return []
        values = output.detach().float().cpu()
        return list(values) if values.dim() >= 4 else [values]  # a batch
    if hasattr(output, "__array__") and hasattr(output, "ndim"):
        return pictures(torch.from_numpy(output))
    if hasattr(output, "convert") and hasattr(output, "tobytes"):  # an image of PIL
        image = output.convert("RGB")
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return [values.view(image.height, image.width, 3).float() / 255]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [picture for item in output for picture in pictures(item)]
    return []


def _psnr_db(actual: Tensor, expected: Tensor, size: float) -> float:
    error = float((actual.double() - expected.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(max(size, 1e-12) ** 2 / error)


def _is_image(picture: Tensor) -> bool:
    in_range = bool(picture.min() >= 0) and bool(picture.max() <= 1)
    return in_range and picture.dim() >= 3 and (picture.shape[-1] in (1, 3) or picture.shape[-3] in (1, 3))


def _lpips(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float | None, str]:
    """(distance, why there is none)."""
    if not all(_is_image(exact) for _, exact in pairs):
        return None, "not images"
    try:
        import lpips
    except ImportError:
        return None, "the package lpips is not installed"
    try:
        distance = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # its weights are downloaded, which fails in many ways
        log.warning("lpips cannot be used: %s", error)
        return None, f"lpips cannot be used: {error}"
    with torch.no_grad():
        return max(float(distance(_frames(one), _frames(of)).max()) for one, of in pairs), ""


def _frames(picture: Tensor) -> Tensor:
    """`[frames, 3, height, width]` in -1 to 1."""
    if picture.shape[-1] in (1, 3):
        picture = picture.movedim(-1, -3)
    picture = picture.reshape(-1, *picture.shape[-3:])
    return (picture * 2 - 1).expand(-1, 3, -1, -1)
