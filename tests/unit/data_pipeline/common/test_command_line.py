"""Arguments as people type them: texts are taken as they are, and what can't be meant gets one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data_pipeline.common.command_line import as_hydra_reads
from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError


def read(*arguments: str, program: str = "sample_images") -> dict[str, Any]:
    """The options of a program for these arguments."""
    with initialize_config_dir(CONF, version_base="1.3"):
        composed = compose(program, as_hydra_reads(arguments, Path(CONF), program))
    return OmegaConf.to_container(composed, resolve=True)


TEXTS = (
    "(masterpiece:1.2) fox", "it's a fox", "a fox, a dog", "\U0001f98a fox", "\u7ea2\u72d0", "a ${x} b", "50% $5 #1",
    "{red|blue} fox", "fox = dog", "true", "007", "1e3", "choice(a,b)", "a: b; c", "back\\slash", "it\\'s", "ends\\",
    "say \"it's\"", "(fox", "fox]", "two\nlines", "fox & <dog>", "*", "~fox", "a, it's", "\u200bfox", "-fox", "a fox",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_and_a_path_are_taken_as_they_are(text: str) -> None:
    given = read(f"prompts={text}", f"negative_prompt={text}", f"output={text.replace('${', '')}")
    assert (given["prompts"], given["negative_prompt"]) == (text, text)
    assert given["output"] == text.replace("${", "")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompts=[a fox,b]", ["a fox", "b"]), ("prompts=['it\\'s', \"#1\"]", ["it's", "#1"]), ("prompts=null", None),
        ("prompts='[fox #1]'", "[fox #1]"), ("prompts=[a ${x} b]", ["a ${x} b"]), ("output='a b'", "a b"),
        ("output=${input}/x", "here/x"), ("labels=[1,2]", [1, 2]), ("step=1000", 1000), ("seed=3", 3), ("output=", ""),
        ("layouts=[[[fox,0,0,0.5,1]]]", [[["fox", 0, 0, 0.5, 1]]]), ("guidance.interval=[0.1,0.8]", [0.1, 0.8]),
    ],
)  # fmt: skip
def test_what_hydra_reads_stays(argument: str, value: object) -> None:
    options: Any = read("input=here", argument)
    for name in argument.partition("=")[0].split("."):
        options = options[name]
    assert options == value


def test_a_number_of_another_program_with_the_name_of_a_text_stays_one() -> None:
    assert read("images=1e6", program="plan_storage")["images"] == 1e6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["training.steps", "=", "60"], "training.steps has blanks beside its equals sign: write training.steps=60."),
        (["training.steps = 60"], "training.steps has blanks beside its equals sign: write training.steps=60."),
        (["training.steps=", "60"], "write training.steps=60."),
        (["training.steps", "=60"], "write training.steps=60."),
        (["--input", "X"], "--input is not an option: write options without dashes, as input=X (see --help)."),
        (["--batch-size=3"], "--batch-size=3 is not an option: write options without dashes, as batch_size=3"),
        (["-o"], "-o is not an option: write options without dashes, as output=..."),
        (["prompts=a", "red", "fox"], "red has no name: write 'prompts=a red', in quotes where it contains blanks."),
        (
            ["prompts=[fox #1]"],
            "write 'prompts=[\"fox #1\"]' for a list, or \"prompts='[fox #1]'\" for",
        ),
        (["prompts=[fox"], "as a [ is not closed: write 'prompts=[\"fox\"]' for a list"),
        (["prompts='it's"], "its quotes don't match"),
        (["seed=1,2"], "write a list in brackets, as 'seed=[1,2]'"),
        (["guidance.interval=[0.1,0.8"], "as a [ is not closed: close it, or"),
        (["guidance.interval=0.8]"], "as a ] closes nothing: write"),
        (["prompts=[a dog's]"], "as an apostrophe (') needs quotes around the text: write"),
        (["prompts=[fox #1]"], "as # needs quotes around the text"),
        (["prompts=[caf\u00e9]"], "as \u00e9 needs quotes around the text"),
    ],
)
def test_sentences(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        as_hydra_reads(arguments, Path(CONF), "sample_images")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_flags_of_hydra_pass() -> None:
    flags = ["--config-dir", "a folder", "--help", "-m", "x=1,2", "--cfg", "job"]
    assert as_hydra_reads(flags, Path(CONF), "sample_images") == flags
    assert as_hydra_reads(["~sampler", "--cfg", "job"], Path(CONF), "sample_images") == ["~sampler", "--cfg", "job"]
