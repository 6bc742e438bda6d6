"""Arguments as people type them, before Hydra's grammar reads them: plain texts and paths, blanks, dashes.

Hydra gives ( ) [ ] { } , = ' # $ and non-ASCII letters a special meaning, or refuses them. The value of a text option
is taken literally where the grammar would refuse it, or would read a sweep or a number. A value that begins like a list
or a quoted text is not guessed at: one sentence shows how to quote it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from data_pipeline.common.errors import UserError
from data_pipeline.common.hydra_messages import options, top_keys
from data_pipeline.common.option_checks import fits
from data_pipeline.common.program_options import PROGRAMS

PROMPTS = ("prompts", "negative_prompt", "labels")
PATHS = (
    "input", "output", "shards", "base", "start_from", "single_file", "images", "prompts_file", "autoencoder.path",
    "autoencoder_path", "decoder", "preview_decoder", "clip.path", "clip_path", "text_encoder.path",
    "text_encoder_path", "classifier.path", "store.cache", "store.endpoint", "source.path", "source.table",
    "source.file", "source.caption", "source.encoding", "training.checkpoints", "training.scratch",
    "training.wandb_project", "project", "run_id",
)  # fmt: skip
TEXTS = (*PROMPTS, *PATHS, "step")
FLAGS = (
    "-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run", "-m",
    "--multirun", "-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
    "--experimental-rerun", "-i", "--info",
)  # fmt: skip
WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")


def as_hydra_reads(arguments: Sequence[str], conf: Path, root: str) -> list[str]:
    """The arguments with texts quoted where needed. UserError for one that Hydra would refuse."""
    if {"-m", "--multirun", "-sc", "--shell-completion"} & set(arguments):
        return list(arguments)
    read, before = [], ""
    for number, argument in enumerate(arguments, 1):
        rest = " ".join(arguments[number:])
        if argument.startswith("-"):
            _refuse_dashes(argument, rest, [*top_keys(conf, root), *options(conf, root)])
        elif before not in WITH_VALUE and not argument.startswith("~"):
            _refuse_pieces(before, argument, rest)
            argument = quoted_if_needed(argument, root)
        read.append(argument)
        before = argument
    return read


def _refuse_dashes(argument: str, rest: str, known: Sequence[str]) -> None:
    name, _, value = argument.partition("=")
    if name in FLAGS:
        return
    option = name.lstrip("-").replace("-", "_")
    near = option if option in known else next((each for each in sorted(known) if each.startswith(option)), "input")
    example = f"{near}={value or rest.partition(' ')[0] or '...'}"
    raise UserError(f"{argument} is not an option: write options without dashes, as {example} (see --help).")


def _refuse_pieces(before: str, argument: str, rest: str) -> None:
    """Refuse an argument that is not name=value: blanks around the equals sign, or a value with unquoted blanks."""
    name, equals, value = argument.partition("=")
    if equals and name and name == name.strip():
        return
    if equals and name.strip():
        name, value = name.strip(), value.strip()
    elif not equals and (found := re.match(r"= ?(\S*)", rest)):
        name, value = argument, found[1] or "..."
    elif not equals and before.endswith("="):
        name, value = before[:-1], argument
    else:
        example = f"'{before} {argument}'" if "=" in before else "name=value"
        raise UserError(f"{argument} has no name: write {example}, in quotes where it contains blanks.")
    raise UserError(f"{name} has blanks beside its equals sign: write {name}={value}.")


def quoted_if_needed(argument: str, program: str) -> str:
    """name=value, quoted if it is the value of a text option; other arguments are only checked."""
    name, _, value = argument.partition("=")
    hint = PROGRAMS[program].get(name.lstrip("+"), str)
    plain = name.lstrip("+")
    if plain in PROMPTS:  # never an interpolation: people write $ and { in prompts
        value = re.sub(r"(?<!\\)\$\{", r"\\${", value)
        argument = f"{name}={value}"
    made, readable = _parsed(argument)
    if plain not in TEXTS or not fits("text", hint):
        if not readable:
            raise UserError(refusal(name, value))
        return argument
    as_meant = isinstance(made, str | list | None) or (isinstance(made, dict) and plain in PATHS) or plain == "step"
    if readable and as_meant:
        return argument
    as_text = f"{name}={quoted(value)}"
    if re.match(r"\s*[\['\"]", value) or _parsed(as_text) != (value, True):
        raise UserError(refusal(name, value))
    return as_text


def quoted(value: str) -> str:
    """In Hydra's single quotes: only quotes, and backslashes before a quote, are escaped."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"


def _parsed(argument: str) -> tuple[Any, bool]:
    """The value that Hydra reads, and whether it reads exactly one: a comma outside a list makes a sweep of several."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return None, False
    return (None, False) if override.is_sweep_override() else (override.value(), True)


def refusal(name: str, value: str) -> str:
    """One sentence that shows how to write this value in a shell."""
    why, unclosed = why_unreadable(value), why_unclosed(value)
    if re.match(r"\s*['\"]", value):
        return f"{name}={value} can't be read: its quotes don't match, or more text follows them."
    if re.match(r"\s*\[", value) and name.lstrip("+") in TEXTS:
        texts = ", ".join(f'"{text.strip()}"' for text in value.strip().strip("[]").replace('"', "").split(","))
        way = shlex.quote(f"{name}=[{texts}]")
        as_text = f'"{name}={quoted(value)}"'
        return f"{name}={value} can't be read, as {unclosed or why}: write {way} for a list, or {as_text} for a text."
    if "," in value and not unclosed:
        return f"{name}={value} can't be read: write a list in brackets, as '{name}=[{value}]'."
    close = "close it, or " if unclosed.endswith("not closed") else ""
    return f'{name}={value} can\'t be read, as {unclosed or why}: {close}write "{name}={quoted(value)}" for a text.'


def why_unclosed(value: str) -> str:
    """The bracket without its counterpart, in words; "" if all have one."""
    for left, right in ("[]", "{}", "()"):
        if value.count(left) != value.count(right):
            more = value.count(left) > value.count(right)
            return f"a {left} is not closed" if more else f"a {right} closes nothing"
    return ""


def why_unreadable(value: str) -> str:
    """The first character that Hydra's grammar takes only in quotes, in words."""
    special = re.sub(r"[\w\s/\\+.$%*@?|:,\[\]{}()-]", "", value, flags=re.ASCII)[:1]
    names = {"'": "an apostrophe (')", '"': 'a quotation mark (")', "": "a bracket or comma"}
    return f"{names.get(special, special)} needs quotes around the text"
