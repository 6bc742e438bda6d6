"""From the command line to an entry's `main(cfg)`, by Hydra; and how errors reach the user."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.common import storage
from data_pipeline.common.command_line import as_hydra_reads
from data_pipeline.common.entry import CONF
from data_pipeline.common.errors import UserError
from data_pipeline.common.experiments import with_experiment
from data_pipeline.common.hydra_messages import (
    RENAMED,
    advice,
    explained,
    say_renamed,
    top_keys,
    with_new_names,
)
from data_pipeline.common.output_checks import NO_ROOM, refuse_unwritable_outputs
from data_pipeline.common.program_options import refuse_wrong_options
from data_pipeline.common.stop_request import speaks

OF_THE_PATH = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
RANK_0_FIRST_S = 2.0  # seconds that other ranks wait before they report an error: rank 0 probably reports the same
# Hydra composes everything again only to read hydra.mode: half a second. Without the mode, --multirun decides.
Hydra.get_mode = lambda *_, **__: None


def run_entry(module: str) -> NoReturn:
    """What `start_entry` does once Hydra is imported."""
    config_name, captured = module.rpartition(".")[2], CapturedStderr()

    def guarded(cfg: DictConfig) -> None:
        captured.stop()
        try:
            _check(cfg, config_name)
            storage.configure(**cfg.get("store", {}))
            importlib.import_module(module).main(cfg)
        except SystemExit as asked:
            _leave_if_one_of_many(asked.code)
            raise
        except Exception as error:
            user_error = _user_error_behind(error)
            if user_error is None:
                raise
            _say_error(str(user_error))
            # Not sys.exit: a rank that leaves while others wait in a collective must not itself wait for them.
            sys.stdout.flush()
            os._exit(user_error.exit_code)
        _leave_if_one_of_many(0)

    guarded.__module__ = module  # Hydra names the job by it
    try:
        arguments = with_experiment(as_hydra_reads(sys.argv[1:], Path(CONF), config_name), Path(CONF), config_name)
        sys.argv[1:] = with_new_names(arguments)
    except UserError as error:
        _say_error(str(error))
        raise SystemExit(error.exit_code) from None
    _with_codes(
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(guarded), captured, config_name
    )
    raise SystemExit(0)


def _check(cfg: DictConfig, config_name: str) -> None:
    """UserError for an option that is missing, unknown, of a wrong type or out of range, or an unwritable output."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            example = " ".join(f"{key}=..." for key in missing)
            raise UserError(f"{', '.join(missing)} must be given: add {example} (see --help).")
        _rename_options(cfg)
        _refuse_unknown(cfg, config_name)
        resolved = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        what = str(error).partition("\n")[0]
        raise UserError(
            f"{error.full_key} can't be read ({what}): ${{name}} stands for another option; write \\${{name}} for the "
            "text itself."
        ) from None
    refuse_wrong_options(resolved, config_name)
    refuse_unwritable_outputs(resolved, config_name)


def _say_error(sentence: str) -> None:
    """Print the sentence that ends a program, once: if all ranks fail alike, the launcher ends the others meanwhile."""
    if not speaks():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_FIRST_S)
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _rename_options(cfg: DictConfig) -> None:
    """Earlier names of options in a user's own files, such as an experiment, become today's."""
    for old, new in RENAMED.items():
        parent, _, name = old.rpartition(".")
        node = cfg.get(parent) if parent else cfg
        if isinstance(node, DictConfig) and name in node:
            say_renamed(old)
            OmegaConf.update(cfg, new, node[name], merge=True)
            with open_dict(node):
                del node[name]


def _refuse_unknown(cfg: DictConfig, config_name: str) -> None:
    """Refuse what Hydra's + added at the top level, where nothing would ever read it."""
    for key in sorted(set(map(str, cfg)) - top_keys(Path(CONF), config_name)):
        raise UserError(f"there is no option {key}{advice(key, Path(CONF), config_name)}.")


class CapturedStderr:
    """What Hydra writes to stderr before main begins: held back, then printed in other words."""

    def __init__(self) -> None:
        self.text, self.begun = io.StringIO(), False
        self.stack = contextlib.ExitStack()

    def start(self) -> None:
        self.stack.enter_context(contextlib.redirect_stderr(self.text))

    def stop(self) -> None:
        """Called when main begins, or when it won't."""
        self.stack.close()
        self.begun = True
        sys.stderr.write(self.text.getvalue())


def _with_codes(started: Callable[[], None], captured: CapturedStderr, config_name: str) -> None:
    """Hydra's own refusals (no such option) exit with 1: as the user's mistakes, make it 2 and one sentence."""
    captured.start()
    try:
        with captured.stack:
            started()
    except SystemExit as asked:
        code = asked.code
        if code and not captured.begun:
            code = UserError.exit_code
            _say_error(explained(captured.text.getvalue(), Path(CONF), config_name))
        _leave_if_one_of_many(code)  # after a crash, too: what it left open may wait for the other ranks
        raise SystemExit(code) from None


def _leave_if_one_of_many(code: int | str | None) -> None:
    """End a rank here: threads of torch and DeepSpeed can abort the interpreter's shutdown, even of a finished job."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(code, str):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """The UserError that Hydra's instantiate may have wrapped, or one for options of a wrong type or a full disk; None
    for any other error."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return UserError(f"no room to write ({error}): make some, and start again to continue.")
        if isinstance(error, OSError) and error.errno in OF_THE_PATH and error.filename is not None:
            return UserError(f"{error.filename} can't be used ({error.strerror}): check the path and its permissions.")
        cause = error.__cause__ if isinstance(error, InstantiationException) else None
        if isinstance(cause, TypeError | ValueError) and not isinstance(cause, UserError):
            if os.environ.get("HYDRA_FULL_ERROR"):
                return None
            where = str(error).rpartition("full_key: ")[2].strip()
            return UserError(
                f"{where} can't be made of its options ({cause}): check them (HYDRA_FULL_ERROR=1 says more)."
            )
        error = cause
    return None
