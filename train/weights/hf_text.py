"""Text encoders of transformers, from a local folder: BERT-like models and T5's encoder, frozen, with their tokenizer.

Nothing is downloaded, no code of the folder runs, and the padding of a caption is left out of its states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from data_pipeline.common.errors import DataError, UserError
from data_pipeline.encode.encoders import TextStates, first
from train.weights.foreign import read_json

# model_type of config.json -> transformers' class, and the options that leave out what the states don't need.
BERT_LIKE = {"add_pooling_layer": False}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT_LIKE),
    "roberta": ("RobertaModel", BERT_LIKE),
    "xlm-roberta": ("XLMRobertaModel", BERT_LIKE),
    "mpnet": ("MPNetModel", BERT_LIKE),
    "albert": ("AlbertModel", BERT_LIKE),
    "distilbert": ("DistilBertModel", {}),
    "electra": ("ElectraModel", {}),
    "modernbert": ("ModernBertModel", {}),
    "t5": ("T5EncoderModel", {}),
    "mt5": ("MT5EncoderModel", {}),
    "umt5": ("UMT5EncoderModel", {}),
}
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
ENOUGH = 1 << 20  # model_max_length of a tokenizer that names none is 10^30
NO_FACTS = ("transformers_version", "torch_dtype", "dtype", "_name_or_path")  # of config.json: don't change the states


class HFTextEncoder(nn.Module):
    """Captions -> states of the last layer per token, after the model's final norm, and the number of its tokens.

    pooled: the mean of a caption's states. context_length: tokens that it reads, with the special ones.
    """

    masked = True  # states of padding are not attended to, unless conditions.text.mask=false

    def __init__(self, model: nn.Module, tokenizer: Any, context_length: int, fingerprint: str) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.context_length, self.fingerprint = context_length, fingerprint
        self.context_dim = model.config.hidden_size

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption, including special ones, before truncation to context_length."""
        return [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextStates:
        """States (B, T, D), zero at padding; their mean (B, D); the number of tokens of each caption (B,)."""
        found = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        mask = found["attention_mask"]
        states = self.model(input_ids=found["input_ids"], attention_mask=mask).last_hidden_state.float()
        lengths = mask.sum(1).clamp(min=1)  # some tokenizers give "" no token at all
        states = states * first(lengths, states.shape[1])[..., None]
        return TextStates(states, states.sum(1) / lengths[:, None], lengths)


def load_text_encoder(path: str, context_length: int = 77) -> HFTextEncoder:
    """The encoder of a transformers folder, in fp32, in eval mode and frozen. context_length: captions are padded or
    cut to so many tokens."""
    folder = Path(path)
    kind = _kind(folder)
    library = transformers()
    tokenizer = _tokenizer(folder, library)
    most = min(tokenizer.model_max_length, _positions(folder, tokenizer))
    if not 2 < context_length <= most:
        limit = "at least 3" if context_length < 3 else f"at most {most}, which this model reads"
        raise UserError(f"context_length={context_length} of {folder} must be {limit}.")
    model = _model(folder, kind, library)
    return HFTextEncoder(model, tokenizer, context_length, fingerprint_of(path, context_length))


def transformers() -> ModuleType:
    """The library, imported when it is first used: it takes seconds."""
    try:
        import transformers as library

        import train.models.torchvision_patch  # noqa: F401  (before transformers imports torchvision)
    except ImportError as error:
        raise UserError(
            f"text_encoder=hf needs transformers ({error}): pip install 'latent-diffusion-training[hf]'."
        ) from error
    return library


def fingerprint_of(path: str, context_length: int = 77) -> str:
    """16 hex digits of a hash of the configuration, weights and tokenizer, without loading the model."""
    folder = Path(path)
    _kind(folder)
    about = read_json(folder / "config.json")
    facts = sorted((name, value) for name, value in about.items() if name not in NO_FACTS)
    digest = hashlib.sha256(repr((facts, context_length)).encode())
    files = [file for pattern in WEIGHTS for file in sorted(folder.glob(pattern))]
    chosen = [file for file in files if file.suffix == files[0].suffix]  # safetensors, where both are there
    for file in (*chosen, *(folder / name for name in TOKENIZER if (folder / name).is_file())):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _kind(folder: Path) -> str:
    """config.json's model_type; UserError for a folder that is not a whole, plain encoder of a known architecture."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: use the folder of a text encoder that transformers saved.")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CLASSES:
        raise UserError(
            f"{folder} contains a {kind}, which is not a known text encoder: use one of {', '.join(CLASSES)}."
        )
    if not any(file.is_file() for pattern in WEIGHTS for file in folder.glob(pattern)):
        raise UserError(f"{folder} has no model.safetensors: use a complete folder.")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} contains an adapter (adapter_config.json): merge it into the model and save that.")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(
            f"{folder} has no tokenizer ({', '.join(VOCABULARIES[:2])} or spiece.model): copy the tokenizer's files of "
            "the same model into it."
        )
    return kind


def _tokenizer(folder: Path, library: ModuleType) -> Any:
    """The folder's tokenizer, which pads on the right."""
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is wrong with its files
        raise UserError(f"{folder}: its tokenizer can't be read ({_brief(error)}): copy its files again.") from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no padding token: add pad_token to tokenizer_config.json.")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _positions(folder: Path, tokenizer: Any) -> int:
    """How many tokens the model's position table has room for; RoBERTa's begins after the padding token's number."""
    about = read_json(folder / "config.json")
    table = about.get("max_position_embeddings")
    if table is None or about["model_type"] in ("t5", "mt5", "umt5"):
        return ENOUGH  # relative positions
    return table - (tokenizer.pad_token_id + 1 if about["model_type"] in ("roberta", "xlm-roberta", "mpnet") else 0)


def _model(folder: Path, kind: str, library: ModuleType) -> nn.Module:
    """The model with its weights; anything missing is refused, as transformers would fill it with random numbers."""
    name, options = CLASSES[kind]
    verbosity = library.utils.logging.get_verbosity()
    library.utils.logging.set_verbosity_error()  # no report of heads that are left out
    library.utils.logging.disable_progress_bar()
    try:
        model, about = getattr(library, name).from_pretrained(
            folder,
            **options,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="eager",  # a config.json could name a kernel to be downloaded
            output_loading_info=True,
        )
    except Exception as error:  # whatever is wrong with its files
        raise DataError(f"{folder} can't be read as {name} ({_brief(error)}): download or save it again.") from error
    finally:
        library.utils.logging.set_verbosity(verbosity)
    lacking = sorted(map(str, [*about["missing_keys"], *about["mismatched_keys"]]))
    if lacking:
        raise UserError(f"{folder} is not a whole {name}: it lacks {', '.join(lacking[:5])}; use a complete folder.")
    return model.eval().requires_grad_(False)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
