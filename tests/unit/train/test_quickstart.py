"""What the quickstart runs again, and what it leaves out."""

from pathlib import Path

import pytest

from train.quickstart import Stage, run_chain

pytestmark = pytest.mark.processes


@pytest.fixture
def chain(tmp_path: Path) -> tuple[list[Stage], Path]:
    """Three scripts that each add a line to `ran`."""
    ran = tmp_path / "ran"
    ran.touch()
    stages = []
    for name in ("one", "two", "three"):
        script = tmp_path / f"{name}.py"
        script.write_text(f"import sys; open({str(ran)!r}, 'a').write('{name}\\n'); sys.exit('fail' in sys.argv)\n")
        stages.append(Stage(str(script), []))
    return stages, ran


def test_what_has_finished_is_left_out(chain, tmp_path):
    stages, ran = chain
    first = run_chain(stages, tmp_path)
    assert run_chain(stages, tmp_path) == first
    assert ran.read_text().split() == ["one", "two", "three"]
    assert all(note["seconds"] > 0 and note["peak_memory_gb"] > 0 for note in first.values())


def test_what_comes_after_a_changed_stage_runs_again(chain, tmp_path):
    stages, ran = chain
    run_chain(stages, tmp_path)
    stages[1] = Stage(stages[1].script, ["other=1"])
    run_chain(stages, tmp_path, only="two")
    run_chain(stages, tmp_path)
    assert ran.read_text().split() == ["one", "two", "three", "two", "three"]


def test_a_failure_ends_the_chain_with_its_code(chain, tmp_path, capsys):
    stages, ran = chain
    stages[1] = Stage(stages[1].script, ["fail"])
    with pytest.raises(SystemExit) as stopped:
        run_chain(stages, tmp_path)
    assert stopped.value.code == 1
    assert "two ended with code 1" in capsys.readouterr().err
    assert ran.read_text().split() == ["one", "two"]
