"""A CLIP built from open_clip's classes; its text tower encodes the U-Net's condition (tau in Rombach et al.)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
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


def architecture(name: str) -> dict[str, Any]:
    """CLIP's keyword arguments for one of open_clip's named architectures, such as ViT-B-32. UserError if there is none
    of this name, or if it has towers of other libraries, which would be downloaded."""
    known = open_clip().factory.list_models()
    config = open_clip().factory.get_model_config(name)
    if config is None:
        near = ", ".join(get_close_matches(name, known, 3) or ["ViT-B-32", "ViT-L-14"])
        raise UserError(
            f"clip.architecture={name} is not an architecture of open_clip: use one of its names, such as {near}."
        )
    vision, text = config.pop("vision_cfg"), config.pop("text_cfg")
    arguments = {"embed_dim": config.pop("embed_dim")} | ({"quick_gelu": True} if config.pop("quick_gelu", 0) else {})
    starts = {"logit_scale": config.pop("init_logit_scale", None), "logit_bias": config.pop("init_logit_bias", None)}
    odd = {**config, **{n: v for n, v in vision.items() if n not in VisionOptions.__annotations__}}
    odd |= {name: value for name, value in text.items() if name not in TextOptions.__annotations__}
    if odd or isinstance(vision.get("layers"), list):
        raise UserError(
            f"clip.architecture={name} is built from more than open_clip's own transformers "
            f"({', '.join(odd) or 'a ResNet'}), which is not supported here: use a plain ViT, such as ViT-B-32."
        )
    return {**arguments, "vision": vision, "text": text} | {n: v for n, v in starts.items() if v is not None}


class CLIP(nn.Module):
    """Image and text towers of `open_clip.model.CLIP`, with its tokenizer (padded with 0)."""

    fingerprint = ""  # of configuration and weights, if loaded

    def __init__(
        self,
        embed_dim: int,
        vision: VisionOptions,
        text: TextOptions,
        quick_gelu: bool = False,
        logit_scale: float | None = None,  # start of the logit scale's logarithm; None: ln(1 / 0.07)
        logit_bias: float | None = None,  # start of SigLIP's bias; None: none
    ) -> None:
        super().__init__()
        self._config = {"embed_dim": embed_dim, "vision_cfg": dict(vision), "text_cfg": dict(text)}
        self._config |= {"quick_gelu": True} if quick_gelu else {}
        self._config |= {} if logit_bias is None else {"init_logit_bias": logit_bias}
        self.towers = open_clip().model.CLIP(
            embed_dim,
            dict(vision),
            dict(text),
            quick_gelu=quick_gelu,
            init_logit_bias=logit_bias,
            nonscalar_logit_scale=True,  # DeepSpeed does not broadcast 0-dimensional parameters
            **({} if logit_scale is None else {"init_logit_scale": logit_scale}),
        )
        self.context_length, self.context_dim, self.embed_dim = text["context_length"], text["width"], embed_dim
        self.tokenizer = tokenizer(self.context_length)

    def forward(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1], resized if necessary, and B captions -> unit image and text features (B, E), and the
        logit scale."""
        tokens = self.tokenizer(list(captions)).to(images.device)
        out = self.towers(self._resized(images).to(self.dtype), tokens)
        return out[:3] if isinstance(out, tuple) else (out["image_features"], out["text_features"], out["logit_scale"])

    def model_config(self) -> dict[str, Any]:
        """open_clip's configuration of this model."""
        return dict(self._config)

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's bias of the logits, (1,); None without one."""
        return self.towers.logit_bias

    def tune(self, compiled: bool, checkpoint_activations: bool) -> None:
        """Options for training. Checkpointing stores only the inputs of each layer and recomputes the rest."""
        if compiled:
            raise UserError("engine.compile is not available for CLIP: leave it out here.")
        self.towers.set_grad_checkpointing(checkpoint_activations)

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
