"""Attention heads of the published U-Nets in CompVis' format, whose files do not show them."""

from __future__ import annotations

from collections.abc import Sequence


class HeadWidth(int):
    """Channels of one head, in place of a number of heads."""


# (channels per level, width of the context): heads of every level, or their width. From the configurations that were
# published with the weights (github.com/CompVis/latent-diffusion, .../stable-diffusion; Stability-AI/stablediffusion).
# Context alone does not decide: cin256 and cin256-v2 both have 512, Stable Diffusion 1 and RDM both have 768.
PUBLISHED = {
    ((224, 448, 672, 896), None): HeadWidth(32),  # celebahq256, ffhq256, lsun_beds256
    ((160, 320, 320, 640), None): HeadWidth(32),  # bsr_sr
    ((128, 512, 1024), None): 8,  # semantic_synthesis256 and 512
    ((256, 512, 1024), 512): HeadWidth(32),  # cin256
    ((192, 384, 576, 960), 512): 1,  # cin256-v2
    ((128, 256, 384, 512), 512): HeadWidth(32),  # layout2img-openimages256
    ((192, 384, 576, 960), 640): HeadWidth(32),  # text2img256
    ((320, 640, 1280, 1280), 1280): 8,  # txt2img-large
    ((448, 896, 1344, 1792), 768): HeadWidth(32),  # retrieval-augmented, rdm768x768
    ((320, 640, 1280, 1280), 768): 8,  # Stable Diffusion 1
    ((320, 640, 1280, 1280), 1024): HeadWidth(64),  # Stable Diffusion 2
}


def published_heads(channels: Sequence[int], context_dim: int | None) -> list[int] | None:
    """Heads of each level of the published U-Net with these widths; None if no published one has them."""
    heads = PUBLISHED.get((tuple(channels), context_dim))
    if isinstance(heads, HeadWidth):
        return [width // heads for width in channels]
    return None if heads is None else [heads] * len(channels)
