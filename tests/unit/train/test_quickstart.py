"""What the quickstart runs again, and what it leaves out."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from train import quickstart
from train.quickstart import Stage, run_chain

CONF = Path(__file__).resolve().parents[3] / "conf"


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
    assert "two failed with exit code 1" in capsys.readouterr().err
    assert ran.read_text().split() == ["one", "two"]


def test_the_demo_says_beforehand_what_is_to_run_and_about_how_long(tmp_path, capsys):
    demo = OmegaConf.load(CONF / "demo/smoke.yaml")
    stages = quickstart.stages(str(tmp_path), demo)
    quickstart.print_plan(stages, tmp_path, demo.measured)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("quickstart: 7 of 7 stages will run, for about ")
    assert [line.split()[0] for line in said[1:]] == [stage.name for stage in stages]
    expected = quickstart.expected_minutes(["train_ldm"], {"train_ldm": 4.0}, slowness=1.5)
    assert expected == {"train_ldm": 6.0}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "demo").glob("*.yaml")))
def test_each_demo_has_arguments_and_minutes_for_every_stage(name, tmp_path):
    demo = OmegaConf.load(CONF / f"demo/{name}.yaml")
    names = {stage.name for stage in quickstart.stages(str(tmp_path), demo)}
    assert set(demo.measured.minutes) == names == set(quickstart.WHAT)


def test_nothing_is_announced_where_all_has_finished(chain, tmp_path, capsys):
    stages, _ = chain
    run_chain(stages, tmp_path)
    capsys.readouterr()
    quickstart.print_plan(stages, tmp_path, OmegaConf.create({}))
    assert capsys.readouterr().out == ""


def test_what_comes_after_a_changed_stage_is_announced_too(chain, tmp_path, capsys, monkeypatch):
    stages, _ = chain
    run_chain(stages, tmp_path)
    stages[1] = Stage(stages[1].script, ["changed"])
    monkeypatch.setattr("train.engine.calibration.calibration_seconds", lambda: 1.0)
    names = [stage.name for stage in stages]
    monkeypatch.setattr(quickstart, "WHAT", dict.fromkeys(names, ""))
    capsys.readouterr()
    measured = OmegaConf.create({"calibration_s": 1.0, "minutes": dict.fromkeys(names, 1.0)})
    quickstart.print_plan(stages, tmp_path, measured)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == names[1:]
