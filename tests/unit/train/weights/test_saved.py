"""Our own models on disk: the same again, or a sentence."""

import json

import pytest
import torch

from data_pipeline.common.errors import DataError, UserError
from train.models.autoencoder import AutoencoderKL, VQModel
from train.models.clip import CLIP
from train.weights.saved import fingerprint, load_autoencoder, load_clip, save_model

CONFIG = {"channels": [8, 16], "layers_per_block": 1, "norm_groups": 4}
CLIP_CONFIG = {
    "embed_dim": 4,
    "vision": {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
    "text": {"context_length": 4, "vocab_size": 49408, "width": 8, "layers": 1, "heads": 1},
}


@pytest.fixture
def saved(tmp_path):
    """A saved autoencoder: its folder, itself and its fingerprint."""
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIG)
    mark = save_model(tmp_path / "ae", "AutoencoderKL", CONFIG, model.state_dict(), {"psnr": 30.0})
    return tmp_path / "ae", model, mark


def test_autoencoder_there_and_back(saved):
    folder, model, mark = saved
    loaded = load_autoencoder(str(folder))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    assert loaded.fingerprint == mark
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert json.loads((folder / "config.json").read_text())["psnr"] == 30.0
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.safetensors"]


def test_vq_model_there_and_back(tmp_path):
    torch.manual_seed(0)
    config = {**CONFIG, "latent_channels": 3, "codebook_size": 20, "attention_levels": [False, True]}
    model = VQModel(**config)
    torch.nn.init.normal_(model.codebook)
    mark = save_model(tmp_path, "VQModel", config, model.state_dict(), {})
    loaded = load_autoencoder(str(tmp_path))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.encode_stored(images), model.encode_stored(images))
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    assert torch.equal(loaded.codebook, model.codebook)
    assert loaded.fingerprint == mark
    state = model.state_dict()
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"].flip(0)  # the same codes, other indices
    assert fingerprint(config, state) != mark


def test_clip_there_and_back(tmp_path):
    torch.manual_seed(0)
    model = CLIP(**CLIP_CONFIG).eval().requires_grad_(False)  # as loaded: torch has a path of its own for it
    mark = save_model(tmp_path, "CLIP", CLIP_CONFIG, model.state_dict(), {})
    loaded = load_clip(str(tmp_path))
    assert torch.equal(loaded.encode_text(["a", ""]).tokens, model.encode_text(["a", ""]).tokens)
    assert loaded.fingerprint == mark


def test_the_fingerprint_is_of_weights_and_configuration(saved):
    _, model, mark = saved
    state = model.state_dict()
    assert fingerprint(CONFIG, state) == mark
    assert len(mark) == 16
    assert fingerprint(dict(reversed(CONFIG.items())), dict(reversed(state.items()))) == mark
    assert fingerprint({**CONFIG, "patch": 1}, state) != mark
    for key in state:
        changed = {**state, key: state[key].clone()}
        changed[key].view(-1)[-1] += 1e-3
        assert fingerprint(CONFIG, changed) != mark, key


def test_a_changed_byte_is_found(saved):
    folder, _, _ = saved
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"weights\.safetensors differs from what was saved"):
        load_autoencoder(str(folder))


def test_a_cut_file_is_a_sentence(saved):
    folder, _, _ = saved
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"weights\.safetensors differs from what was saved"):
        load_autoencoder(str(folder))


def test_wrong_class_and_nothing_there(saved, tmp_path):
    with pytest.raises(UserError, match=r"clip\.path=.*ae contains a AutoencoderKL, not a CLIP: .* train_clip\.py"):
        load_clip(str(saved[0]))
    with pytest.raises(
        UserError,
        match=r"autoencoder\.path=.*nowhere contains no AutoencoderKL or VQModel: .* train_autoencoder\.py run",
    ):
        load_autoencoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"clip\.path=.* finished train_clip\.py run"):
        load_clip(str(tmp_path))
