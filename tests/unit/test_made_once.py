"""What is made once for all workers of pytest."""

import multiprocessing
import os
import time

import pytest
from made_once import changed_files, made_once


def make_slowly(folder):
    (folder / "maker").write_text(str(os.getpid()))
    time.sleep(0.05)
    (folder / "whole").touch()


def claim(folder, found):
    made_once(folder, make_slowly)
    found.put(((folder / "maker").read_text(), (folder / "whole").exists()))


@pytest.mark.processes
def test_one_of_several_processes_makes_it_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=claim, args=(tmp_path / "a", found)) for _ in range(4)]
    for process in processes:
        process.start()
    makers, whole = zip(*(found.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert len(set(makers)) == 1
    assert all(whole)


def test_what_failed_is_made_again_from_nothing(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise ValueError("something broke")

    with pytest.raises(ValueError, match="something broke"):
        made_once(tmp_path / "a", fail)
    assert [path.name for path in made_once(tmp_path / "a", make_slowly).iterdir()].count("half") == 0


@pytest.mark.parametrize("change", ["write", "add", "remove"])
def test_a_change_is_seen(tmp_path, change):
    folder = made_once(tmp_path / "a", make_slowly)
    assert changed_files(folder) == []
    name = {"write": "maker", "add": "new", "remove": "whole"}[change]
    (folder / name).unlink() if change == "remove" else (folder / name).write_text("other")
    assert changed_files(folder) == [name]
