"""Stable Diffusion's text encoders against transformers' CLIPTextModel and open_clip's CLIP, on random weights."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.common.errors import UserError
from train.models.clip import CLIP
from train.weights.open_clip import (
    fits_single_file,
    load_text_encoder,
    save_text_encoder,
    single_file_state,
    text_map,
    tower_of,
    transformers_names,
)

pytestmark = pytest.mark.slow
CAPTIONS = ["", "a red apple", "Two Very LONG words " * 30, "don't - 42 naïve cafés, grinning face 😀"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(params=["quick_gelu", "gelu"])
def theirs(request):
    """A CLIPTextModel as SD 1.x (quick_gelu) and SD 2.x have it, but narrow."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**SIZES, hidden_act=request.param, eos_token_id=49407)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def refuse_no_difference(encoder, theirs, relative_error):
    ids, states = encoder.tokens(CAPTIONS), encoder.encode_text(CAPTIONS)
    with torch.no_grad():
        expected = theirs(ids)
    assert relative_error(states.tokens, expected.last_hidden_state) < 1e-5
    assert relative_error(states.pooled, expected.pooler_output) < 1e-5


def test_a_folder_gives_transformers_states(theirs, tmp_path, relative_error):
    theirs.save_pretrained(tmp_path / "text_encoder")
    for path in (tmp_path, tmp_path / "text_encoder"):
        encoder = load_text_encoder(path)
        refuse_no_difference(encoder, theirs, relative_error)
        assert not encoder.training
        assert not any(p.requires_grad for p in encoder.parameters())


def test_captions_are_padded_as_each_was_trained(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "text_encoder")
    encoder = load_text_encoder(tmp_path)
    ids = encoder.tokens(["", "a red apple"])
    assert ids.shape == (2, 77)
    pad = 49407 if theirs.config.hidden_act == "quick_gelu" else 0
    assert ids[0].tolist() == [49406, 49407] + [pad] * 75
    assert ids[1].tolist() == [49406, 320, 736, 3055, 49407] + [pad] * 72
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    assert load_text_encoder(tmp_path).tokens([""])[0, -1] == 0


def test_what_we_save_transformers_reads(theirs, tmp_path, relative_error, sha256):
    from transformers import CLIPTextModel, CLIPTokenizer

    theirs.save_pretrained(tmp_path / "theirs")
    encoder = load_text_encoder(tmp_path / "theirs")
    save_text_encoder(tmp_path / "a", encoder)
    refuse_no_difference(encoder, CLIPTextModel.from_pretrained(tmp_path / "a/text_encoder").eval(), relative_error)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "a/tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, encoder.tokens(CAPTIONS))
    again = load_text_encoder(tmp_path / "a")
    assert again.fingerprint == encoder.fingerprint
    save_text_encoder(tmp_path / "b", again)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_single_files_hold_the_same_encoder(theirs, tmp_path, sha256):
    theirs.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file(single_file_state(encoder), file)
        loaded = load_text_encoder(file)
        assert loaded.fingerprint == encoder.fingerprint
        encoder = loaded
    assert sha256(files[0])["a.safetensors"] == sha256(files[1])["b.safetensors"]


def test_sd1_in_a_single_file_by_its_published_names(tmp_path, relative_error):
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(CLIPTextConfig(**SIZES, hidden_act="quick_gelu", eos_token_id=49407)).eval()
    state = {f"cond_stage_model.transformer.text_model.{name}": v for name, v in theirs.state_dict().items()}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"state_dict": state}, tmp_path / "sd1.ckpt")
    refuse_no_difference(load_text_encoder(tmp_path / "sd1.ckpt"), theirs, relative_error)


def test_sd2_is_the_layer_before_the_last_of_open_clips_tower(tmp_path, relative_error):
    """In CompVis' words: all blocks but the last, then ln_final."""
    text = {"width": 128, "heads": 2, "layers": 4, "context_length": 77, "vocab_size": 49408}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    clip = open_clip.model.CLIP(128, vision, text).eval()
    state = {
        f"cond_stage_model.model.{name}": value
        for name, value in clip.state_dict().items()
        if not name.startswith("visual.")
    }
    save_file(state, tmp_path / "sd2.safetensors")
    encoder = load_text_encoder(tmp_path / "sd2.safetensors")
    with torch.no_grad():
        ids = open_clip.SimpleTokenizer()(CAPTIONS)
        x = clip.token_embedding(ids) + clip.positional_embedding
        for block in list(clip.transformer.resblocks)[:-1]:
            x = block(x, attn_mask=clip.attn_mask)
        expected = clip.ln_final(x)
    assert torch.equal(encoder.tokens(CAPTIONS), ids)
    assert relative_error(encoder.encode_text(CAPTIONS).tokens, expected) < 1e-5


def test_our_own_clips_tower_is_carried_over():
    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "layers": 2, "heads": 2}
    clip = CLIP(12, {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}, text).eval()
    encoder = tower_of(clip)
    expected = clip.encode_text(CAPTIONS)
    torch.testing.assert_close(encoder.encode_text(CAPTIONS).tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    assert tower_of(encoder) is encoder
    assert not fits_single_file(encoder)  # heads of 16: a reader would take them for one of 64


def test_the_map_is_a_bijection():
    carried = text_map(transformers_names(3))
    ours, theirs = [name for one in carried for name in one.ours], [one.theirs for one in carried]
    assert sorted(ours) == sorted(transformers_names(3))
    assert len(set(theirs)) == len(theirs)


def test_what_is_no_text_encoder(theirs, tmp_path):
    with pytest.raises(UserError, match=r"has no text_encoder/config\.json"):
        load_text_encoder(tmp_path)
    save_file({"cond_stage_model.transformer.bert": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="contains no text encoder of Stable Diffusion"):
        load_text_encoder(tmp_path / "x.safetensors")
    theirs.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(UserError, match=r"encoder\.layers\.3\.layer_norm1\.bias is missing"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('gelu"', 'relu"'))
    with pytest.raises(UserError, match="relu, not CLIP's text model"):
        load_text_encoder(tmp_path)
