"""What a data set, a run or a model folder says can't make this program run, write or fetch anything.

Every place where a file is built from, with what a stranger may put there; through the code that the entries call.
docs/security.md tells what is promised.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import save_file
from synthetic import NO_ENCODERS, TINY_LATENTS, TINY_UNET, run, write_splits

from data_pipeline.common import saved_names, saved_objects
from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import DataError, UserError
from data_pipeline.common.saved_names import LIST, named
from data_pipeline.common.saved_objects import GROUPS, build, checked
from data_pipeline.shards.manifest import Manifest
from train.data.build import network_of
from train.data.latent_facts import LatentFacts
from train.distributed.ranks import Ranks
from train.models.autoencoder import AutoencoderKL
from train.models.classifier import NoisyClassifier
from train.models.clip import CLIP
from train.models.conditioning import ConditionedUNet
from train.sampling.trained_run import SECTIONS, merged_with_run_config, open_run
from train.train_ldm import train
from train.weights.published import load_weights
from train.weights.saved import load_autoencoder, load_classifier, load_clip, save_model

OLD = Path(__file__).parent / "run_of_before"  # config.yaml and latents.json with Python's paths
AUTOENCODER = {"channels": [8, 16], "layers_per_block": 1, "norm_groups": 4}
CLASSIFIER = {"in_channels": 4, "classes": 2, "channels": [16], "heads": 2, "norm_groups": 8}
CLIP_OPTIONS = {
    "embed_dim": 4,
    "vision": {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
    "text": {"context_length": 4, "vocab_size": 49408, "width": 8, "layers": 1, "heads": 1},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with autoencoder/, clip/ and classifier/, and the fingerprints of what latents are made by."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    about = {"belongs_to": {"fold": 1}, "class_names": ["flags", "hearts"]}
    marks = {}
    for name, model, options in (
        ("autoencoder", AutoencoderKL, AUTOENCODER),
        ("clip", CLIP, CLIP_OPTIONS),
        ("classifier", NoisyClassifier, CLASSIFIER),
    ):
        state = model(**options).state_dict()
        marks[name] = save_model(folder / name, model.__name__, options, state, about)
    return folder, {"autoencoder": marks["autoencoder"], "text_encoder": marks["clip"]}


def written(folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """A run's folder, without its weights: its configuration, as far as it is opened by that, and its facts."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({name: config[name] for name in SECTIONS if name in config}))
    (folder / "latents.json").write_text(json.dumps(facts))
    return folder


def network_in(config: Mapping[str, Any], facts: LatentFacts) -> ConditionedUNet:
    """The network that a run's configuration describes."""
    unet = checked(config["unet"], "unet", "unet")
    parts = {name: build(entry, "conditioning", name) for name, entry in config["conditioning"].items()}
    return network_of(unet.arguments, unet.build, parts, facts)


@pytest.fixture(scope="module")
def old_run(encoders: tuple[Path, dict[str, str]]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A run of an earlier version: its folder, configuration and facts."""
    folder, marks = encoders
    config = yaml.safe_load((OLD / "config.yaml").read_text().replace("FOLDER", str(folder)))
    facts = json.loads((OLD / "latents.json").read_text())
    facts["fingerprints"] = {"images": "i", **marks}
    written(folder / "run", config, facts)
    save_file({"text": torch.zeros(4, 8)}, folder / "run/null.safetensors")
    torch.manual_seed(0)
    network = network_in(config, LatentFacts.of_run(folder / "run"))
    step = folder / "run/checkpoints/step-00000001"
    step.mkdir(parents=True)
    save_file(network.state_dict(), step / "ema.safetensors")
    data = (step / "ema.safetensors").read_bytes()
    manifest = {"ema.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (step / "manifest.json").write_text(json.dumps(manifest))
    return folder / "run", config, facts


# Files of before.


def test_a_run_of_an_earlier_version_opens_and_draws(old_run: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    opened = open_run(str(old_run[0]), "latest")
    assert opened.facts.classes("label") == ["flags", "hearts"]
    assert opened.conditions["text"].fields == ("text",)
    sampler, guidance = (
        merged_with_run_config(opened.config, g, {"steps": 2} if g == "sampler" else {}) for g in DRAWN
    )
    assert (sampler.steps, sampler.times.__name__, guidance.interval) == (2, "trailing_times", [0.1, 0.9])
    rows = [{"key": str(i), "caption": "a fox", "meta": {"group": name}} for i, name in enumerate(("flags", "hearts"))]
    drawn = opened.generator.draw(opened.encode_conditions(rows), sampler, guidance, seed=0)
    assert drawn.shape == (2, 16, 16, 3)


DRAWN = ("sampler", "guidance")


def test_what_a_run_saves_names_no_path_of_code_that_is_built_from_it(
    old_run: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    LatentFacts.of_run(old_run[0]).save(tmp_path)
    assert "_target_" not in (tmp_path / "latents.json").read_text()
    saved = named(old_run[1])
    assert "_target_" not in str({group: saved[group] for group in (*LIST, "objective") if group in saved})
    assert named(saved) == saved
    assert saved["sampler"]["times"] == {"name": "trailing"}
    assert saved["conditioning"]["label"] == {"name": "label", "dim": 8}
    assert saved["optimizer"]["_target_"] == "train.engine.optimizer.AdamW"  # a record: nothing is built from it
    assert saved["training"]["bad_numbers"]["_target_"] == "train.loop.stability_monitor.StabilityConfig"


def test_what_has_moved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"train.once": "train.diffusion.process", "train.twice.Old": "train.diffusion.losses.Huber"}
    monkeypatch.setattr(saved_names, "MOVED", moved)
    assert named({"_target_": "train.once.DiscreteVP", "steps": 10}) == {"name": "discrete_vp", "steps": 10}
    assert named([{"_target_": "train.twice.Old"}]) == [{"name": "huber"}]


# Every place that a file is built from.


def changed(tree: Mapping[str, Any], place: str, entry: Any) -> dict[str, Any]:
    tree = copy.deepcopy(dict(tree))
    *above, last = place.split(".")
    functools.reduce(lambda part, name: part[name], above, tree)[last] = entry
    return tree


def found_at(tree: Mapping[str, Any], place: str) -> Any:
    return functools.reduce(lambda part, name: part[name], place.split("."), tree)


IN_CONFIG = [
    "unet", "autoencoder", "clip", "conditioning.label", "objective", "objective.process", "objective.parameterization",
    "objective.time_sampling", "objective.loss", "objective.weighting", "sampler", "sampler.function", "sampler.times",
    "guidance",
]  # fmt: skip
# What a stranger may want: of other packages, of this one, by Hydra's own helpers, by notations that are no names.
PROOF = "PROOF"  # the file whose being there would show that something ran
NAMED = {
    "writes a file": {"_target_": "logging.FileHandler", "filename": PROOF},
    "runs a pickle": {"_target_": "torch.load", "f": "PICKLE", "weights_only": False},
    "runs text": {"_target_": "builtins.exec", "_args_": [f"open({PROOF!r}, 'w')"]},
    "runs a shell": {"_target_": "os.system", "command": f"touch {PROOF}"},
    "is ours, not listed": {"_target_": "data_pipeline.common.storage.write_atomically", "path": PROOF, "content": "x"},
    "asks Hydra": {"_target_": "hydra.utils.get_method", "path": "os.system"},
    "asks Hydra to call": {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.getcwd"}},
    "contains unknown names": {"_target_": ["os.system"]},
    "is a path as a name": {"name": "os.system", "command": f"touch {PROOF}"},
    "is both": {"name": "unet", "_target_": "os.system", "command": f"touch {PROOF}"},
    "is nothing": {},
    "is no table": "os.system",
}
ADDED = {
    "holds another": {"surplus": NAMED["writes a file"]},
    "is partial": {"_partial_": "yes"},
    "has positions": {"_args_": [NAMED["writes a file"]]},
    "recurses": {"_recursive_": True},
    "converts": {"_convert_": "all"},
    "looks up": {"${oc.env:HOME}": 1},
}
KINDS = {**NAMED, **ADDED}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], Any]]:
    """hostile(kind, entry): the entry as a stranger would have it. What it would do has not been done by the end."""

    def make(kind: str, entry: Any) -> Any:
        text = json.dumps(NAMED.get(kind) if kind in NAMED else {**entry, **ADDED[kind]})
        return json.loads(text.replace(PROOF, str(proof)).replace("PICKLE", str(tmp_path / "pickle")))

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(proof), "w")

    proof = tmp_path / "proof"
    (tmp_path / "pickle").write_bytes(pickle.dumps(Runs()))
    yield make
    assert not proof.exists()


def refused(do: Callable[[], Any], file: str, entry: str) -> str:
    """One sentence with the file and the entry's name."""
    with pytest.raises(DataError) as caught:
        do()
    sentence = str(caught.value)
    assert file in sentence
    assert entry in sentence
    assert "\n" not in sentence
    assert len(sentence) < 1000
    return sentence


def places_and_kinds() -> Iterator[Any]:
    """All kinds at two places; at the others the plainest and a quarter of the rest, in turn."""
    for i, place in enumerate(IN_CONFIG):
        for j, kind in enumerate(KINDS):
            plainest = kind in ("writes a file", "holds another")
            kept = place in ("unet", "sampler.function") or plainest or (i + j) % 4 == 0
            yield pytest.param(place, kind, marks=() if kept else pytest.mark.exhaustive)


@pytest.mark.parametrize(("place", "kind"), list(places_and_kinds()))
def test_a_runs_configuration(place: str, kind: str, old_run: Any, hostile: Any, tmp_path: Path) -> None:
    folder, config, facts = old_run
    entry = hostile(kind, found_at(named(config), place))
    copied = written(tmp_path / "run", changed(config, place, entry), facts)
    for name in ("null.safetensors", "checkpoints"):
        (copied / name).symlink_to(folder / name)
    refused(lambda: open_run(str(copied), "latest"), f"{copied}/config.yaml", place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_facts(kind: str, old_run: Any, hostile: Any, tmp_path: Path) -> None:
    folder, config, facts = old_run
    entry = hostile(kind, found_at(facts, "conditions.text"))
    copied = written(tmp_path / "run", config, changed(facts, "conditions.text", entry))
    for name in ("null.safetensors", "checkpoints"):
        (copied / name).symlink_to(folder / name)
    refused(lambda: open_run(str(copied), "latest"), f"{copied}/latents.json", "conditions")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("latents"), TINY_LATENTS, 16)


@pytest.mark.parametrize("kind", ["writes a file", "runs a pickle", "is ours, not listed", "holds another"])
def test_a_data_set(kind: str, latents: Path, hostile: Any, tmp_path: Path) -> None:
    """Through train_ldm.py itself."""
    for name in ("heldout", "train/shards", "train/null.safetensors"):
        (tmp_path / "data/train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).symlink_to(latents / name)
    manifest = json.loads((latents / "train/manifest.json").read_text())
    entry = hostile(kind, found_at(manifest, "info.conditions.text"))
    manifest = changed(manifest, "info.conditions.text", entry)
    (tmp_path / "data/train/manifest.json").write_text(json.dumps(manifest))
    given = [f"input={tmp_path}/data", f"output={tmp_path}/run", "training.batch_size=8", "fold=1"]
    given += ["unet.in_channels=4", "unet.out_channels=4", *TINY_UNET, *NO_ENCODERS]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train_ldm", given)
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    refused(lambda: train(cfg, ranks), f"{tmp_path}/data/train/manifest.json", "conditions")
    assert not (tmp_path / "run").exists()


MODELS = {"autoencoder": load_autoencoder, "clip": load_clip, "classifier": load_classifier}


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("model", MODELS)
def test_a_models_folder(model: str, kind: str, encoders: Any, hostile: Any, tmp_path: Path) -> None:
    about = json.loads((encoders[0] / model / "config.json").read_text())
    about["config"] = hostile(kind, about["config"])
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "weights.safetensors").symlink_to(encoders[0] / model / "weights.safetensors")
    refused(lambda: MODELS[model](str(tmp_path)), f"{tmp_path}/config.json", about["class"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cls", ["os.system", "FileHandler", "AutoencoderKL2", None, ["CLIP"]])
def test_a_model_of_another_class(model: str, cls: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"class": cls, "config": {}, "fingerprint": ""}))
    with pytest.raises(UserError, match=r"contains a .*, not a "):
        MODELS[model](str(tmp_path))


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ("text", {"hf_model_name": "somebody/something"}),
        ("text", {"hf_tokenizer_name": "somebody/something"}),
        ("vision", {"timm_model_name": "vit", "timm_model_pretrained": True}),
        ("vision", {"width": "8"}),
        ("text", {"act_kwargs": {"_target_": "os.getcwd"}}),
    ],
)
def test_a_clip_that_would_be_fetched_from_elsewhere(
    tower: str, options: dict[str, Any], encoders: Any, tmp_path: Path
) -> None:
    about = json.loads((encoders[0] / "clip/config.json").read_text())
    about["config"][tower] |= options
    (tmp_path / "config.json").write_text(json.dumps(about))
    refused(lambda: load_clip(str(tmp_path)), "config.json", f"CLIP.{tower}")


def test_a_run_to_start_from_is_only_read(old_run: Any, hostile: Any, tmp_path: Path) -> None:
    folder, config, facts = old_run
    entry = {**config["unet"], **hostile("writes a file", {})}
    copied = written(tmp_path / "run", changed(config, "unet", entry), facts)
    (copied / "checkpoints").symlink_to(folder / "checkpoints")
    network = network_in(config, LatentFacts.of_run(folder))
    load_weights(network, str(copied))


# What is listed, with wrong arguments.


@pytest.mark.parametrize(
    ("place", "entry", "words"),
    [
        ("unet", {"name": "unett"}, r"unet names unett, which is not one of unet: did it mean unet\?"),
        ("objective.process", {"name": "discrete_pv"}, r"did it mean discrete_vp\?"),
        ("objective.process", {"name": "discrete_vp", "step": 10}, r"has no argument step: did it mean steps\?"),
        ("objective.process", {"name": "discrete_vp", "steps": "10"}, r"steps=10 is not valid: .* a whole number"),
        ("objective.process", {"name": "discrete_vp", "steps": 10.5}, r"steps=10\.5 is not valid"),
        ("objective.process", {"name": "discrete_vp", "schedule": "x"}, r"process\.schedule=x is unknown"),
        ("objective.process", {"_target_": "train.models.unet.UNet"}, r"names unet, which is not one of rectified"),
        ("objective.loss", {"name": "huber", "delta": None}, r"loss\.delta=None is not valid"),
        ("conditioning.label", {"name": "label"}, r"conditioning\.label lacks dim"),
        ("conditioning.label", {"name": "label", "dim": 8, "facts": {}}, r"has no argument facts"),
        ("conditioning.label", {"name": "label", "dim": True}, r"label\.dim=True is not valid"),
        ("objective", {"name": "latent_diffusion"}, r"objective lacks process, parameterization, time_sampling"),
        ("sampler.function", {"name": "ddim", "eta": [0]}, r"sampler\.function\.eta=\[0\] is not valid: .* a number"),
        ("sampler.times", {"name": "karras", "process": 1}, r"sampler\.times has no argument process"),
        ("guidance", {"name": "classifier_free", "interval": [0, "1"]}, r"interval=\[0, '1'\] is not valid"),
        ("guidance", {"name": "classifier_free", "interval": [1, 0]}, r"guidance\.interval=\[1, 0\] is not valid"),
        ("unet", {"name": "unet", "channels": "[8,16]"}, r"unet\.channels=\[8,16\] is not valid: .* a list"),
        ("unet", {"name": "unet", "channels": [8, "${oc.env:HOME}"]}, r"unet\.channels=.*oc.env:HOME.* is not valid"),
        ("unet", {"name": "unet", "channels": [0], "attention_levels": [True]}, r"unet can't be built|unet\."),
        ("autoencoder", {"name": "trained", "path": ["a"]}, r"autoencoder\.path=\['a'\] is not valid"),
        ("autoencoder", {"name": "trained", "path": "${oc.env:HOME}"}, r"path=\$\{oc\.env:HOME\} contains no"),
        ("conditioning", [1], r"config\.yaml has no conditioning"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(place: str, entry: Any, words: str, old_run: Any, tmp_path: Path) -> None:
    folder, config, facts = old_run
    if place == "unet" and entry.get("name") == "unet":
        entry = {**named(config)["unet"], **entry}
    copied = written(tmp_path / "run", changed(config, place, entry), facts)
    for name in ("null.safetensors", "checkpoints"):
        (copied / name).symlink_to(folder / name)
    with pytest.raises(UserError, match=words):
        open_run(str(copied), "latest")


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: !!python/object/apply:os.system [ls]", "unet: {a: 1}"])
def test_a_configuration_that_is_none(text: str, old_run: Any, tmp_path: Path) -> None:
    copied = written(tmp_path / "run", {}, old_run[2])
    (copied / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        open_run(str(copied), "latest")


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", "abc"), ("shapes", [1]), ("fold", None), ("conditions", {"text": 3}), ("std", ["a"])],
)
def test_facts_of_another_kind(name: str, value: Any, old_run: Any, tmp_path: Path) -> None:
    (tmp_path / "latents.json").write_text(json.dumps({**old_run[2], name: value}))
    with pytest.raises(DataError, match=rf"latents\.json: {name}="):
        LatentFacts.of_run(tmp_path)


def test_facts_without_latents(old_run: Any, tmp_path: Path) -> None:
    (tmp_path / "latents.json").write_text(json.dumps({**old_run[2], "shapes": {"moments": []}}))
    with pytest.raises(DataError, match=r"latents\.json has no field with latents \(moments"):
        LatentFacts.of_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("info", []), ("fields", {"moments.npy": 1}), ("fields", [1]), ("fingerprints", "x"), ("fingerprints", {"a": 1}),
     ("fields", {}), ("fields", {"moments.npy": {"shape": "abc"}})],
)  # fmt: skip
def test_a_manifest_of_other_kinds(name: str, value: Any, latents: Path, tmp_path: Path) -> None:
    manifest = json.loads((latents / "train/manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, name: value}))
    (tmp_path / "null.safetensors").symlink_to(latents / "train/null.safetensors")
    with pytest.raises(DataError, match=r"manifest\.json"):
        LatentFacts.of(str(tmp_path), Manifest.load(tmp_path), 1)


def test_tensors_that_are_none(old_run: Any, tmp_path: Path) -> None:
    _, config, facts = old_run
    copied = written(tmp_path / "run", config, facts)
    (copied / "null.safetensors").write_bytes(b"none")
    with pytest.raises(DataError, match=r"null\.safetensors is damaged"):
        LatentFacts.of_run(copied)
    save_file({}, copied / "null.safetensors")
    step = copied / "checkpoints/step-00000001"
    step.mkdir(parents=True)
    (step / "ema.safetensors").write_bytes(b"none")
    digest = hashlib.sha256(b"none").hexdigest()
    for manifest in ({"ema.safetensors": {"bytes": 4, "sha256": digest}}, {"ema.safetensors": 1}, [1]):
        (step / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"ema\.safetensors is damaged"):
            open_run(str(copied), "latest")


def test_weights_of_another_model_than_described(tmp_path: Path) -> None:
    state = AutoencoderKL(**AUTOENCODER).state_dict()
    save_model(tmp_path, "AutoencoderKL", {**AUTOENCODER, "channels": [8, 8]}, state, {})
    with pytest.raises(DataError, match=r"weights\.safetensors does not fit config\.json \(size mismatch"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize("unet", [[1], {"heads": 2, "channels": 3}, {"heads": "x"}, "os.system"])
def test_a_run_to_start_from_with_another_unet(unet: Any, old_run: Any, tmp_path: Path) -> None:
    folder, config, facts = old_run
    copied = written(tmp_path / "run", {**config, "unet": unet}, facts)
    network = network_in(config, LatentFacts.of_run(folder))
    with pytest.raises(DataError, match=r"config\.yaml: unet"):
        load_weights(network, str(copied))


# The list itself.


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in LIST.items() for name in names], ids=lambda value: value
)
def test_no_argument_of_anything_listed_goes_unchecked(group: str, name: str) -> None:
    """Each is given by the program, is an entry itself, or has an annotation that an arbitrary object does not fit."""
    make = saved_objects._imported(LIST[group][name], name)
    parameters, is_open = saved_objects._parameters(make)
    hints, about = saved_objects._hints(make), GROUPS[group]
    assert not is_open
    plain = [p for p in parameters if p not in about.supplied and p not in dict(about.parts)]
    assert [p for p in plain if saved_objects.fits(object(), hints[p])] == []
    assert inspect.isclass(make) or inspect.isfunction(make)


def in_conf(group: str) -> Iterator[tuple[str, Any]]:
    """Options of a group of conf/, as a run's configuration holds them; a sampler without its spacing."""
    for path in sorted((Path(CONF) / group).glob("*.yaml")):
        if path.stem == "from_start":  # no run records it, but the U-Net that it stands for
            continue
        text = path.read_text().replace("${unet.context_dim}", "32").replace("???", "somewhere")
        entry = yaml.safe_load(text.replace("path: null", "path: somewhere"))
        yield path.stem, next(iter(entry.values())) if group in ("conditions", "conditioning") else entry


OPENED = {path.name for path in Path(CONF).iterdir()} - {"objective", "classifier"}  # the rest of these is given
UNTRAINED = ("AutoencoderKL", "VQModel", "CLIP")  # no run is drawn by them


@pytest.mark.parametrize("group", [group for group in LIST if group in OPENED])
def test_whatever_conf_offers_can_be_opened_again(group: str) -> None:
    for name, entry in in_conf(group):
        assert "_target_" not in str(named(entry)), f"add conf/{group}/{name}.yaml to LIST in saved_names.py"
        if named(entry)["name"] in UNTRAINED:
            continue
        again = checked(named(entry), group, name)
        assert again.make is checked(entry, group, name).make
        if group in ("process", "parameterization", "loss", "weighting", "time_sampling", "guidance"):
            ours, theirs = again.build(), instantiate(entry, _convert_="all")
            assert (ours is theirs) if inspect.isfunction(theirs) else (type(ours) is type(theirs))


# A user's own classes.

MINE = "class Mine:\n    def __init__(self, width: int, **more):\n        self.width, self.more = width, more\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """own(file, text): such a file in conf/, and a module own_module with a class Mine."""
    (tmp_path / "own_module.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(saved_objects, "CONF", tmp_path / "conf")

    def add(file: str, text: str) -> None:
        (tmp_path / "conf" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / file).write_text(text)
        saved_objects.targets_in_conf.cache_clear()

    add("unet/demo.yaml", "_target_: train.models.unet.UNet\n")
    yield add
    saved_objects.targets_in_conf.cache_clear()


ENTRY = {"_target_": "own_module.Mine", "width": 3, "depth": 2}


@pytest.mark.parametrize("file", ["unet/mine.yaml", "experiment/mine.yaml"])
def test_a_class_that_conf_names_is_the_users_own(file: str, own: Callable[[str, str], None]) -> None:
    with pytest.raises(DataError, match=r"names own_module\.Mine.*add a file to conf/unet/.*docs/security\.md"):
        build(ENTRY, "unet", "config.yaml: unet")
    own(file, ("unet:\n  " if "experiment" in file else "") + "_target_: own_module.Mine\n")
    made = build(ENTRY, "unet", "config.yaml: unet")
    assert (made.width, made.more) == (3, {"depth": 2})
    with pytest.raises(DataError, match=r"unet\.width=x is not valid"):
        build({**ENTRY, "width": "x"}, "unet", "config.yaml: unet")
    with pytest.raises(DataError, match=r"loss names own_module\.Mine"):  # named as a U-Net, not as a loss
        build(ENTRY, "loss", "config.yaml: loss")


def test_hydras_helpers_are_nobodys_own(own: Callable[[str, str], None]) -> None:
    own("unet/mine.yaml", "_target_: hydra.utils.instantiate\nconfig: {_target_: hydra.utils.call}\n")
    for path in ("instantiate", "call"):
        with pytest.raises(DataError, match=f"names hydra.utils.{path}"):
            build({"_target_": f"hydra.utils.{path}", "config": {}}, "unet", "config.yaml: unet")


def test_the_command_line_is_the_users_own_and_the_file_is_not(own: Callable[[str, str], None]) -> None:
    saved = {"name": "sampler", "function": {"name": "euler"}, "steps": 5, "times": {"name": "uniform"}}
    with pytest.raises(UserError, match=r"sampler\.function names own_module\.Mine"):
        merged_with_run_config({"sampler": {**saved, "function": ENTRY}}, "sampler", {"steps": 2})
    mine = {"_target_": "own_module.Mine", "_partial_": True, "width": 3}
    made = merged_with_run_config({"sampler": saved}, "sampler", {"function": mine, "steps": None})
    assert (made.function().width, made.steps) == (3, 5)
    with pytest.raises(UserError, match=r"sampler\.steps=2\.5 is not valid") as caught:
        merged_with_run_config({"sampler": saved}, "sampler", {"steps": 2.5})
    assert caught.value.exit_code == 2


@pytest.mark.processes
def test_a_user_reads_one_sentence(old_run: Any, tmp_path: Path) -> None:
    """Of the entry script itself; the issue's own example."""
    evil = {"_target_": "logging.FileHandler", "filename": str(tmp_path / "proof")}
    copied = written(tmp_path / "run", changed(old_run[1], "sampler.times", evil), old_run[2])
    done = run("train/sample_images.py", f"input={copied}", "prompts=[a]", "labels=[flags]", check=False)
    assert done.returncode == DataError.exit_code
    assert done.stderr.splitlines()[-1].startswith(f"error: {copied}/config.yaml: sampler.times names logging.FileH")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "proof").exists()
