"""Reads and writes Stable Diffusion's text encoders: transformers' CLIPTextModel folders, and parts of single files.

SD 1.x: CLIP ViT-L/14's text tower, quick GELU, states of the last layer, captions padded with the end token.
SD 2.x: OpenCLIP ViT-H's, exact GELU, states of the last layer but one, captions padded with 0.
Both: after the final norm. Here each is an open_clip text tower that ends with the layer that is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.storage import write_atomically
from data_pipeline.encode.encoders import TextStates
from train.models.clip import CLIP, token_counts, tokenizer
from train.models.open_clip_alone import open_clip
from train.weights.diffusers import write_config
from train.weights.foreign import (
    Form,
    TensorMapping,
    load_exactly,
    read_folder,
    read_json,
    read_tensors,
    refuse_mismatch,
    to_foreign,
    write_tensors,
)
from train.weights.saved import fingerprint

_SCALARS = ("logit_scale", "logit_bias")
STEMS = ("model", "pytorch_model", "model.fp16")
IN_SD1, IN_SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
END_OF_TEXT = 49407
HEAD_WIDTH = 64  # in every published CLIP's text tower; single files do not store it

_INSIDE = {  # in a layer: open_clip's name -> transformers'
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_OUTSIDE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_TOWER = ("embeddings.", "encoder.", "final_layer_norm.")
_FUSED = Form(lambda ours: torch.cat(list(ours)), lambda theirs: theirs.chunk(3))


class TextEncoder(nn.Module):
    """Captions -> states per token for cross-attention. options: width, heads, layers, context_length, vocab_size."""

    fingerprint = ""  # of options and weights, if loaded

    def __init__(self, options: Mapping[str, Any], quick_gelu: bool, pad_id: int) -> None:
        super().__init__()
        self.options, self.quick_gelu, self.pad_id = dict(options), quick_gelu, pad_id
        activation = open_clip().transformer.QuickGELU if quick_gelu else nn.GELU
        self.tower = open_clip().transformer.TextTransformer(**options, act_layer=activation, proj_type="none")
        self.tokenizer = tokenizer(options["context_length"])
        self.context_dim, self.context_length = options["width"], options["context_length"]

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(B, T) ids: start, byte pairs, end, and padding."""
        ids = self.tokenizer(list(captions))
        behind_the_end = torch.arange(ids.shape[1]) > ids.argmax(1, keepdim=True)  # the end token has the highest id
        return ids.masked_fill(behind_the_end, self.pad_id).to(self.tower.ln_final.weight.device)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption, including start and end, before truncation to context_length."""
        return token_counts(captions)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """Normalised states of the last layer (B, T, D); that of the end-of-text token is the pooled one (B, D)."""
        ids = self.tokens(captions)
        out = self.tower.forward_intermediates(
            ids, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        states = out["text_intermediates"][0].float()
        return TextStates(states, states[torch.arange(len(ids)), ids.argmax(1)])


def text_map(names: Iterable[str]) -> list[TensorMapping]:
    """transformers' names (release 5, no "text_model.") -> open_clip's, qkv fused; `to_foreign` gives open_clip's."""
    carried, fused = [], {}
    back = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    inside = {theirs: ours for ours, theirs in _INSIDE.items()}
    for name in names:
        if name in back:
            carried.append(TensorMapping((name,), back[name]))
            continue
        number, module, leaf = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
        layer = f"transformer.resblocks.{number}"
        if module in inside:
            carried.append(TensorMapping((name,), f"{layer}.{inside[module]}.{leaf}"))
        else:  # self_attn.{q,k,v}_proj
            fused[f"{layer}.attn.in_proj_{leaf}"] = tuple(
                f"encoder.layers.{number}.self_attn.{part}_proj.{leaf}" for part in "qkv"
            )
    return [*carried, *(TensorMapping(ours, theirs, _FUSED) for theirs, ours in fused.items())]


def transformers_names(layers: int) -> list[str]:
    """Names of all parameters of a CLIPTextModel with `layers` layers."""
    modules = [*_INSIDE.values(), *(f"self_attn.{part}_proj" for part in "qkv")]
    inside = [f"encoder.layers.{i}.{module}.{leaf}" for i in range(layers) for module in modules for leaf in _LEAVES]
    return [*_OUTSIDE.values(), *inside]


_LEAVES = ("weight", "bias")


def load_text_encoder(path: str | Path) -> TextEncoder:
    """The text encoder of a diffusers or transformers folder or of a single file, in eval mode and frozen."""
    return _of_file(Path(path)) if Path(path).is_file() else _of_folder(Path(path))


def _of_folder(path: Path) -> TextEncoder:
    folder = next((f for f in (path / "text_encoder", path) if (f / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{path} has no text_encoder/config.json: use a folder that diffusers saved.")
    config = read_json(folder / "config.json")
    _refuse_other_text_models(config, folder)
    state = {}
    for name, value in read_folder(folder, STEMS).items():
        name = name.removeprefix("text_model.")
        if name.startswith(_TOWER) and not name.endswith("position_ids"):
            state[name] = value
    quick = config.get("hidden_act", "quick_gelu") == "quick_gelu"
    encoder = TextEncoder(_options(config), quick, _pad_of(path / "tokenizer", quick))
    return _filled(encoder, _fused_state(state, encoder, folder), folder)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """CLIPTextConfig -> open_clip's names, with CLIPTextConfig's defaults."""
    width = config.get("hidden_size", 512)
    return {
        "context_length": config.get("max_position_embeddings", 77),
        "vocab_size": config.get("vocab_size", 49408),
        "width": width,
        "heads": config.get("num_attention_heads", 8),
        "layers": config.get("num_hidden_layers", 12),
        "mlp_ratio": config.get("intermediate_size", 2048) / width,
    }


def _refuse_other_text_models(config: Mapping[str, Any], folder: Path) -> None:
    kind, activation = config.get("model_type", "clip_text_model"), config.get("hidden_act", "quick_gelu")
    if kind not in ("clip_text_model", "clip") or activation not in ("gelu", "quick_gelu"):
        raise UserError(f"{folder} contains a {kind} with {activation}, not CLIP's text model: use Stable Diffusion's.")
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(
            f"{folder}: layer_norm_eps={config['layer_norm_eps']} is not supported here: use Stable Diffusion's text "
            "encoder."
        )


def _pad_of(tokenizer: Path, quick_gelu: bool) -> int:
    """The id that captions are padded with: from the tokenizer's files, else the usual one of this tower."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            token = read_json(tokenizer / name).get("pad_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if token in _PADS:
                return _PADS[token]
    return END_OF_TEXT if quick_gelu else 0


_PADS = {"<|endoftext|>": END_OF_TEXT, "!": 0}


def _of_file(path: Path) -> TextEncoder:
    state = read_tensors(path, lambda name: name.startswith("cond_stage_model."))
    if any(name.startswith(f"{IN_SD1}text_model.") for name in state):
        return _of_sd1(state, path)
    if f"{IN_SD2}positional_embedding" in state:
        return _of_sd2({name.removeprefix(IN_SD2): value for name, value in state.items()}, path)
    raise UserError(
        f"{path} contains no text encoder of Stable Diffusion (cond_stage_model.*): use its folder or file."
    )


def _of_sd1(state: Mapping[str, Tensor], path: Path) -> TextEncoder:
    prefix = f"{IN_SD1}text_model."
    state = {n.removeprefix(prefix): v for n, v in state.items() if not n.endswith("position_ids")}
    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    encoder = TextEncoder(
        {
            "context_length": len(state["embeddings.position_embedding.weight"]),
            "vocab_size": vocabulary,
            "width": width,
            "heads": max(width // HEAD_WIDTH, 1),
            "layers": 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layers.")),
            "mlp_ratio": len(state["encoder.layers.0.mlp.fc1.bias"]) / width,
        },
        quick_gelu=True,
        pad_id=END_OF_TEXT,
    )
    return _filled(encoder, _fused_state(state, encoder, path), path)


def _of_sd2(state: dict[str, Tensor], path: Path) -> TextEncoder:
    """The file contains the whole tower; its last layer and its projection are not used."""
    number = re.compile(r"transformer\.resblocks\.(\d+)\.")
    last = max(int(m[1]) for m in map(number.match, state) if m)
    unused = (f"transformer.resblocks.{last}.", "text_projection", "logit_scale", "attn_mask")
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    vocabulary, width = state["token_embedding.weight"].shape
    encoder = TextEncoder(
        {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": width,
            "heads": max(width // HEAD_WIDTH, 1),
            "layers": last,
            "mlp_ratio": len(state["transformer.resblocks.0.mlp.c_fc.bias"]) / width,
        },
        quick_gelu=False,
        pad_id=0,
    )
    return _filled(encoder, state, path)


def _fused_state(state: Mapping[str, Tensor], encoder: TextEncoder, where: Path) -> dict[str, Tensor]:
    """transformers' tensors under the tower's names; one UserError names all that don't fit."""
    carried, own, expected = text_map(transformers_names(encoder.options["layers"])), encoder.tower.state_dict(), {}
    for one in carried:
        expected |= dict(zip(one.ours, one.form.from_foreign(own[one.theirs]), strict=True))
    refuse_mismatch(expected, state, where)
    return to_foreign(carried, state)


def _filled(encoder: TextEncoder, state: Mapping[str, Tensor], where: str | Path) -> TextEncoder:
    load_exactly(encoder.tower, state, where)
    about = {**encoder.options, "quick_gelu": encoder.quick_gelu, "pad_id": encoder.pad_id}
    encoder.fingerprint = fingerprint(about, encoder.tower.state_dict())
    return encoder.eval().requires_grad_(False)


def tower_of(model: nn.Module) -> TextEncoder:
    """The text tower of a trained CLIP (models/clip.py) as a TextEncoder; a TextEncoder is returned unchanged."""
    if isinstance(model, TextEncoder):
        return model
    towers, layer = model.towers, model.towers.transformer.resblocks[0]
    state = {name: value for name, value in towers.state_dict().items() if not name.startswith("visual.")}
    options = {
        "context_length": model.context_length,
        "vocab_size": towers.vocab_size,
        "width": model.context_dim,
        "heads": layer.attn.num_heads,
        "layers": len(towers.transformer.resblocks),
        "mlp_ratio": layer.mlp.c_fc.out_features / model.context_dim,
    }
    quick = isinstance(layer.mlp.gelu, open_clip().transformer.QuickGELU)
    encoder = TextEncoder(options, quick, pad_id=0)
    return _filled(encoder, {n: v for n, v in state.items() if n not in ("text_projection", "logit_scale")}, "clip")


def transformers_state(encoder: TextEncoder) -> dict[str, Tensor]:
    """The weights under CLIPTextModel's names in the published form, with the prefix "text_model."."""
    own, state = encoder.tower.state_dict(), {}
    for one in text_map(transformers_names(encoder.options["layers"])):
        state |= dict(zip(one.ours, one.form.from_foreign(own[one.theirs]), strict=True))
    return {f"text_model.{name}": value for name, value in state.items()}


def save_text_encoder(folder: Path, encoder: TextEncoder) -> None:
    """Writes <folder>/text_encoder for transformers' CLIPTextModel, <folder>/tokenizer for its CLIPTokenizer."""
    options, words = encoder.options, encoder.tokenizer.encoder
    write_tensors(folder / "text_encoder" / "model.safetensors", transformers_state(encoder))
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": options["width"],
        "intermediate_size": round(options["width"] * options["mlp_ratio"]),
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "max_position_embeddings": options["context_length"],
        "vocab_size": options["vocab_size"],
        "hidden_act": "quick_gelu" if encoder.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": END_OF_TEXT - 1,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": encoder.pad_id,
    }
    write_config(folder / "text_encoder" / "config.json", config)
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    write_config(folder / "tokenizer" / "vocab.json", {named.get(word, word): i for word, i in words.items()})
    merges = ["#version: 0.2", *(" ".join(pair) for pair in encoder.tokenizer.bpe_ranks)]
    write_atomically(folder / "tokenizer" / "merges.txt", ("\n".join(merges) + "\n").encode())
    pad = next(token for token, number in _PADS.items() if number == encoder.pad_id)
    tokens = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": options["context_length"], "do_lower_case": True}
    write_config(folder / "tokenizer" / "special_tokens_map.json", tokens)
    write_config(folder / "tokenizer" / "tokenizer_config.json", {**about, **tokens})


def fits_single_file(encoder: TextEncoder) -> bool:
    """Whether readers of single files, which assume HEAD_WIDTH, get the right number of heads."""
    return encoder.options["width"] == HEAD_WIDTH * encoder.options["heads"]


def single_file_state(encoder: TextEncoder) -> dict[str, Tensor]:
    """The weights under a single file's names: those of SD 1.x if the tower has quick GELU, else of SD 2.x.

    Readers of SD 2.x skip the last layer, so a layer that adds nothing is appended.
    """
    if encoder.quick_gelu:
        return {IN_SD1 + name: value for name, value in transformers_state(encoder).items()}
    state, count = encoder.tower.state_dict(), encoder.options["layers"]
    last = {name: value for name, value in state.items() if name.startswith(f"transformer.resblocks.{count - 1}.")}
    for name, value in last.items():
        adds = ".attn.out_proj." in name or ".mlp.c_proj." in name
        behind = name.replace(f".resblocks.{count - 1}.", f".resblocks.{count}.")
        state[behind] = torch.zeros_like(value) if adds else value
    state["text_projection"] = torch.eye(encoder.options["width"])
    return {IN_SD2 + name: value.clone() for name, value in state.items()}


def save_open_clip(folder: Path, clip: CLIP) -> None:
    """Writes open_clip_config.json and open_clip_model.safetensors, for open_clip.create_model("local-dir:<folder>"),
    or with pretrained=<file> for a named architecture; loads strictly there."""
    towers = clip.towers
    state = {name: value.reshape(()) if name in _SCALARS else value for name, value in towers.state_dict().items()}
    write_tensors(folder / "open_clip_model.safetensors", state)
    about = {"model_cfg": clip.model_config(), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    write_config(folder / "open_clip_config.json", about)
