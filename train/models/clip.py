"""A CLIP built from open_clip's classes; its text tower encodes the U-Net's condition (tau in Rombach et al.)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from data_pipeline.encode.encoders import TextStates
from train.models.open_clip_alone import open_clip

VOCABULARY = 49408  # byte pairs of OpenAI's CLIP


@functools.cache
def tokenizer(context_length: int) -> Callable[[list[str]], Tensor]:
    """Captions -> (B, context_length) ids, padded with 0. open_clip includes the vocabulary. Takes half a second."""
    return open_clip().SimpleTokenizer(context_length=context_length)


def token_counts(captions: Sequence[str]) -> list[int]:
    """The number of CLIP tokens of each caption, including start and end."""
    return [len(tokenizer(77).encode(caption)) + 2 for caption in captions]


class CaptionTokens:
    """CLIP's tokenizer without the model; counts tokens for a text encoder that reads `context_length` of them."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return token_counts(captions)


class Transformer(TypedDict, total=False):
    """Options of either tower, by open_clip's names. A saved CLIP may set no others: some load other models."""

    width: int
    layers: int
    mlp_ratio: float
    ls_init_value: float | None
    pool_type: str
    final_ln_after_pool: bool
    output_tokens: bool


class VisionOptions(Transformer, total=False):
    """Options of the image tower."""

    image_size: int | Sequence[int]
    patch_size: int
    head_width: int
    patch_dropout: float
    attentional_pool: bool
    attn_pooler_queries: int
    attn_pooler_heads: int
    no_ln_pre: bool
    pos_embed_type: str


class _Length(TypedDict):
    context_length: int
    width: int


class TextOptions(Transformer, _Length, total=False):
    """Options of the text tower."""

    vocab_size: int
    heads: int
    embed_cls: bool
    pad_id: int
    eos_id: int
    no_causal_mask: bool
    proj_bias: bool
    proj_type: str


class CLIP(nn.Module):
    """Image and text towers of `open_clip.model.CLIP`, with its tokenizer (padded with 0)."""

    fingerprint = ""  # of configuration and weights, if loaded

    def __init__(self, embed_dim: int, vision: VisionOptions, text: TextOptions) -> None:
        super().__init__()
        self.towers = open_clip().model.CLIP(
            embed_dim,
            dict(vision),
            dict(text),
            nonscalar_logit_scale=True,  # DeepSpeed does not broadcast 0-dimensional parameters
        )
        self.context_length, self.context_dim, self.embed_dim = text["context_length"], text["width"], embed_dim
        self.tokenizer = tokenizer(self.context_length)

    def forward(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1], resized if necessary, and B captions -> unit image and text features (B, E), and the
        logit scale."""
        tokens = self.tokenizer(list(captions)).to(images.device)
        out = self.towers(self._resized(images).to(self.dtype), tokens)
        return out if isinstance(out, tuple) else (out["image_features"], out["text_features"], out["logit_scale"])

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption, including start and end, before truncation to context_length."""
        return token_counts(captions)

    @property
    def dtype(self) -> torch.dtype:
        return self.towers.text_projection.dtype

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """Normalised states of the last layer per token (B, T, D), and the text embedding (B, E) at unit variance."""
        tokens = self.tokenizer(list(captions)).to(self.towers.text_projection.device)
        out = self.towers.forward_intermediates(
            text=tokens, text_indices=1, normalize_intermediates=True, text_output_fmt="NLC"
        )
        pooled = nn.functional.normalize(out["text_features"], dim=-1) * self.embed_dim**0.5
        return TextStates(out["text_intermediates"][0].float(), pooled.float())

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the image embedding (B, E) at unit variance."""
        features = self.towers.encode_image(self._resized(images).to(self.dtype), normalize=True)
        return (features * self.embed_dim**0.5).float()

    def _resized(self, images: Tensor) -> Tensor:
        """Resized to the image tower's size."""
        size = tuple(self.towers.visual.image_size)
        if tuple(images.shape[-2:]) == size:
            return images
        return nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
