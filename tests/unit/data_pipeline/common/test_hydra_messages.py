"""A wrong option gets the options there are, in one sentence and with code 2."""

import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from synthetic import TINY_LATENTS, run, write_latents

from data_pipeline.common import progress
from data_pipeline.common.entry import CONF
from data_pipeline.common.hydra_messages import explained, top_keys, with_new_names
from data_pipeline.common.progress import Progress


def offered(group):
    """All options of a group but the last, as a message lists them."""
    return ", ".join(sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml"))[:-1])


WRONG = {
    "filters=[shortest_sid]": f"filters=shortest_sid is not to be had: take {offered('filters')} or ",
    "filters.aspect.at_most=3": "no option filters.aspect.at_most unless it is chosen: add filters=[aspect].",
    "+filters.aspect.at_most=3": "filters.aspect is set, but no such filter chosen: add filters=[aspect].",
    "source.limt=3": "there is no option source.limt: is it source.limit",
    "+sorce=folder": "there is no option sorce: is it source",
    "+foo.bar=1": "there is no option foo (see --help).",
    "source.limit=-1": "source.limit=-1 must be a whole number",
    "size=large": "size=large must be a whole number",
    "--hepl": "unrecognized arguments: --hepl",
}


@pytest.mark.processes
@pytest.mark.parametrize("wrong", WRONG)
def test_a_slip_in_an_option(wrong, tmp_path):
    done = run("data_pipeline/make_shards.py", f"output={tmp_path}/out", wrong, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(WRONG[wrong]) == 1
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("root", sorted(path.stem for path in Path(CONF).glob("*.yaml") if path.stem != "quiet"))
def test_no_entry_holds_a_key_that_would_be_refused(root):
    """Nor does an experiment: train/test_configurations.py."""
    with initialize_config_dir(CONF, version_base="1.3"):
        assert set(compose(root)) <= top_keys(Path(CONF), root)


@pytest.mark.processes
def test_options_of_a_wrong_kind_are_said_once(tmp_path):
    wrong = ["filters=[aspect]", "filters.aspect.at_most=x"]
    done = run("data_pipeline/make_shards.py", f"output={tmp_path}/out", *wrong, check=False)
    assert done.returncode == 2
    assert done.stderr.count("not supported between") == 1
    assert done.stderr.startswith("error: filters.aspect can't be made of its options")


def test_what_is_not_known_stays_as_hydra_says_it():
    said = "Something else\n\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
    assert explained(said, Path(CONF), "make_shards") == "Something else"
    assert f"take {offered('conditions')} or " in explained(
        "In 'x': Could not load 'conditions/txt'.", Path(CONF), "precompute_latents"
    )


def test_a_condition_that_is_not_stored_is_said_to_be_none():
    said = explained("In 'x': Could not load 'conditions/size'.", Path(CONF), "precompute_latents")
    assert said == "conditions=size: conditioning=[size] needs nothing that is stored for it: leave size out."


def test_without_a_terminal_a_line_comes_though_nothing_is_done(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.05)
    with Progress("wait", 7, "images") as bar:
        bar.advance(3, aside="1")
        end = time.monotonic() + 30
        while "wait: 3/7 images" not in (said := capsys.readouterr().err) and time.monotonic() < end:
            time.sleep(0.01)
    assert "aside 1" in said


@pytest.mark.parametrize(("old", "new"), [
    ("training.may_change=[seed]", "training.allow_mismatch=[seed]"),
    ("++training.bad_numbers.max_skipped=3", "++training.stability.max_skipped=3"),
    ("captions_kept=5", "caption_cache_size=5"),
    ("training.may_changes=[seed]", "training.may_changes=[seed]"),
    ("prompts=training.may_change=3", "prompts=training.may_change=3"),
])  # fmt: skip
def test_options_by_their_earlier_names(old, new, capsys):
    assert with_new_names(["seed=1", old]) == ["seed=1", new]
    assert (" is now " in capsys.readouterr().err) == (old != new)


@pytest.mark.processes
def test_earlier_names_on_the_command_line_and_in_files_get_a_sentence_with_todays(tmp_path):
    (tmp_path / "experiment").mkdir()
    experiment = "# @package _global_\ntraining: {bad_numbers: {spike_factor: 0.5}}\n"
    (tmp_path / "experiment/mine.yaml").write_text(experiment)
    write_latents(tmp_path / "train", 8, TINY_LATENTS)
    given = [f"input={tmp_path}", f"output={tmp_path}/run", "autoencoder.path=a", "clip.path=b"]
    mine = ["training.steps=1", "training.batch_size=1", "training.may_change=[seed]", "experiment=mine"]
    done = run("train/train_ldm.py", *given, *mine, f"--config-dir={tmp_path}", check=False)
    assert done.returncode == 2, done.stderr
    assert "the option training.may_change is now training.allow_mismatch;" in done.stderr
    assert "the option training.bad_numbers is now training.stability;" in done.stderr
    assert "error: training.stability.spike_factor=0.5 must be above 1" in done.stderr
