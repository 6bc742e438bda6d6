"""Text states are open_clip's own."""

import pytest
import torch
from torch.nn import functional as F

from train.models.clip import CLIP

SMALL = {
    "embed_dim": 12,
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 16, "layers": 2, "heads": 2},
}
CAPTIONS = ["", "a red apple", "two very long words " * 9, "grinning face"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    model = CLIP(**SMALL).eval()
    with torch.no_grad():  # away from the initialisation
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_pooled_is_open_clips_embedding_at_unit_variance(clip):
    pooled = clip.encode_text(CAPTIONS).pooled
    with torch.no_grad():
        theirs = clip.towers.encode_text(clip.tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(pooled, theirs * 12**0.5)
    torch.testing.assert_close(pooled.square().mean(1), torch.ones(4))


def test_tokens_are_the_states_that_the_embedding_is_made_of(clip):
    states, ids = clip.encode_text(CAPTIONS), clip.tokenizer(CAPTIONS)
    assert states.tokens.shape == (4, 8, 16)
    ends = states.tokens[torch.arange(4), ids.argmax(1)]  # of the end-of-text token, the highest id
    embedding = F.normalize(ends @ clip.towers.text_projection, dim=-1) * 12**0.5
    torch.testing.assert_close(embedding, states.pooled)
    # and they are causal: what follows a token does not change its state.
    other = clip.encode_text(["a red bicycle"]).tokens[0]
    torch.testing.assert_close(other[:3], states.tokens[1, :3])
    assert not torch.allclose(other[3], states.tokens[1, 3])


def test_text_states_do_not_depend_on_the_batch(clip):
    together = clip.encode_text(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = clip.encode_text([caption])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.pooled[0], together.pooled[i])


def test_forward_gives_unit_features_and_the_scale(clip):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        image, text, scale = clip(images, CAPTIONS)
        torch.testing.assert_close(image, clip.towers.encode_image(images, normalize=True))
        torch.testing.assert_close(text, clip.towers.encode_text(clip.tokenizer(CAPTIONS), normalize=True))
        torch.testing.assert_close(scale, clip.towers.logit_scale.exp())
