"""The losses of pairs against open_clip's, the bound of the logit scale, and zero-shot classification."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipeline.common.errors import UserError
from train.engine.optimizer import AdamW, Schedule, without_decay
from train.evaluation.retrieval import caption_ranks, retrieval_of
from train.evaluation.zero_shot import ZeroShot
from train.models.clip import CLIP, architecture
from train.models.open_clip_alone import open_clip
from train.objectives.contrastive import Contrastive
from train.weights.open_clip import save_open_clip

SMALL = {
    "embed_dim": 12,
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text": {"context_length": 8, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2},
}


def a_clip(**options):
    torch.manual_seed(0)
    return CLIP(**SMALL, **options)


def test_the_sigmoid_loss_is_open_clips(image_batch):
    clip = a_clip(logit_scale=math.log(10), logit_bias=-10.0)
    batch = image_batch(step=1, captions=[f"picture {i}" for i in range(8)])
    objective = Contrastive(clip, shift=0, loss="sigmoid")
    terms = objective(batch)
    mirrored = []
    clip.register_forward_pre_hook(lambda module, given: mirrored.append(given[0]))
    objective(batch)
    image, text, scale = clip(mirrored[0], batch.captions)
    expected = open_clip().loss.SigLipLoss()(image, text, scale, clip.logit_bias)
    torch.testing.assert_close(terms.total, expected)
    assert float(scale) == pytest.approx(10)
    features = F.normalize(torch.eye(8)[[0, 1, 2, 3, 4, 5, 6, 0]], dim=-1)
    apart = objective._sigmoid(features, features, torch.tensor(20.0), [*"abcdefga"])
    taken = objective._sigmoid(features, features, torch.tensor(20.0), [*"abcdefgh"])
    torch.testing.assert_close(taken - apart, -2 * F.logsigmoid(torch.tensor(-10.0)) / 8)  # copies are no negatives


def test_what_the_sigmoid_loss_needs_is_said():
    with pytest.raises(UserError, match=r"objective.loss=sigmoid needs a bias .* add clip.logit_bias=-10"):
        Contrastive(a_clip(), loss="sigmoid")
    with pytest.raises(UserError, match=r"objective.loss=siglip is not a loss of pairs: use one of softmax, sigmoid"):
        Contrastive(a_clip(), loss="siglip")


def test_the_embeddings_that_open_clip_exempts_have_no_weight_decay():
    objective = Contrastive(a_clip())
    exempt = without_decay(objective)
    towers = "clip.towers."
    assert exempt >= {f"{towers}positional_embedding", f"{towers}visual.positional_embedding"}
    decayed = AdamW(1e-3, Schedule(), weight_decay=0.2).build(objective, torch.device("cpu")).param_groups[0]["params"]
    names = {name for name, p in objective.named_parameters() if any(p is each for each in decayed)}
    # open_clip_train's rule: no vectors, scales or embeddings of positions and class
    assert f"{towers}token_embedding.weight" in names
    assert not any(
        "positional" in name or "class_embedding" in name or "bias" in name or "ln_" in name for name in names
    )


def test_an_architecture_by_name_and_what_is_none():
    named = architecture("ViT-B-32")
    assert named == {
        "embed_dim": 512,
        "vision": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }
    assert architecture("ViT-B-32-quickgelu")["quick_gelu"] is True
    with pytest.raises(
        UserError, match=r"clip.architecture=ViT-B-23 is not an architecture of open_clip: use .*ViT-B-32"
    ):
        architecture("ViT-B-23")
    for other in ("RN50", "ViT-B-16-SigLIP", "convnext_base"):
        with pytest.raises(UserError, match=r"built from more than open_clip's own transformers .* plain ViT"):
            architecture(other)


def test_open_clip_loads_what_is_saved(tmp_path):
    """Strictly, by its own create_model, from the folder; and the same features."""
    clip = a_clip(quick_gelu=True, logit_bias=-10.0).eval()
    save_open_clip(tmp_path, clip)
    theirs = open_clip().create_model(f"local-dir:{tmp_path}", load_weights=True).eval()
    images, ids = torch.rand(2, 3, 16, 16), clip.tokenizer(["a fox", "a hen"])
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(images), clip.towers.encode_image(images))
        torch.testing.assert_close(theirs.encode_text(ids), clip.towers.encode_text(ids))
    torch.testing.assert_close(theirs.logit_scale.detach().reshape(1), clip.towers.logit_scale.detach())
    loaded = open_clip().load_checkpoint(theirs, str(tmp_path / "open_clip_model.safetensors"), strict=True)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])


def samples_of(count):
    pixels = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    return [
        {"key": f"{i}", "caption": f"thing {i}", "image": pixels[i], "meta": {"kind": "odd" if i % 2 else "even"}}
        for i in range(count)
    ]


def test_retrieval_names_its_candidates():
    clip, samples = a_clip().eval(), samples_of(30)
    figures = retrieval_of(clip, {"heldout": samples})
    images = torch.from_numpy(np.stack([s["image"] for s in samples])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        image, text, _ = clip(images, [s["caption"] for s in samples])
    order = (text @ image.T).argsort(1, descending=True)
    found = [order[i].tolist().index(i) for i in range(30)]
    assert caption_ranks(clip, samples).tolist() == found
    for n in (1, 5, 10):
        assert figures[f"heldout_retrieval_top{n}"] == pytest.approx(sum(rank < n for rank in found) / 30)
    assert figures["heldout_candidates"] == 30


def test_zero_shot_is_the_nearest_class_name():
    clip, samples = a_clip().eval(), samples_of(20)
    zero_shot = ZeroShot("kind", ("{}", "a picture of {}"))
    figures = zero_shot.accuracy(clip, samples)
    images = torch.from_numpy(np.stack([s["image"] for s in samples])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        image = clip.towers.encode_image(images, normalize=True)
        each = [[t.replace("{}", name) for t in zero_shot.templates] for name in ("even", "odd")]
        text = [F.normalize(clip.towers.encode_text(clip.tokenizer(names)), dim=-1).mean(0) for names in each]
        nearest = (image @ F.normalize(torch.stack(text), dim=-1).T).argmax(1)
    right = [("even", "odd")[n] == s["meta"]["kind"] for n, s in zip(nearest.tolist(), samples, strict=True)]
    assert figures == {"heldout_zero_shot_top1": pytest.approx(sum(right) / 20), "heldout_zero_shot_classes": 2}
    with pytest.raises(UserError, match=r"zero_shot.field=label is not in the json of 0: use .*\(kind\)"):
        ZeroShot("label").accuracy(clip, samples)
    with pytest.raises(UserError, match=r"without \{\}, where the class name goes"):
        ZeroShot("kind", ("a picture",))
