"""The pages: what they link to and name exists; their plots and the map are drawn from the code that they describe."""

import ast
import functools
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MATHS = ROOT / "docs" / "maths.md"
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s]+)\)")
GROUPS = {p.relative_to(CONF).as_posix() for p in CONF.rglob("*") if p.is_dir()}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def links(page):
    return [(text, to) for text, to in LINK.findall(page.read_text()) if "://" not in to]


def test_relative_links_lead_somewhere(page):
    missing = [to for _, to in links(page) if not (page.parent / to.partition("#")[0]).exists()]
    assert missing == []


def names_in(path):
    """Functions, classes and constants of a module, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{m.name}" for m in ast.iter_child_nodes(node) if isinstance(m, ast.FunctionDef)}
    return names


def test_linked_functions_are_in_the_linked_file(page):
    code = [(text, page.parent / to) for text, to in links(page) if to.endswith(".py")]
    assert [f"{text} in {path.name}" for text, path in code if text not in {path.name, *names_in(path)}] == []
    assert page != MATHS or len(code) > 50


def test_every_sampler_weighting_and_process_is_explained():
    text = MATHS.read_text()
    for group in ("process", "parameterization", "loss", "weighting", "sampler", "spacing", "conditioning"):
        names = [path.stem for path in (CONF / group).glob("*.yaml")]
        assert [name for name in names if f"| `{name}` |" not in text] == [], group


# group=name and group.key=value on command lines and in prose, and `group.key` alone.
CHOICE = re.compile(r"(?<![\w./])((?:[a-z_]+/)?[a-z_]+)=(\[?[\w,]+\]?)")
KEY = re.compile(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)=|`([a-z_]+(?:\.[a-z_]+)+)`")


def test_named_options_exist(page):
    chosen = [(group, names) for group, names in CHOICE.findall(page.read_text()) if group in GROUPS]
    named = [(group, name) for group, names in chosen for name in names.strip("[]").split(",") if name]
    assert [f"{g}={n}" for g, n in named if not (CONF / g / f"{n}.yaml").exists()] == []
    keys = [set_to or named for set_to, named in KEY.findall(page.read_text()) if set_to or is_key(named)]
    assert [key for key in keys if not is_option(key.split("."))] == []


def test_options_at_the_head_of_a_table_hold_for_its_rows():
    rows = re.findall(r"\| `(\w+)=` \|.*\n\|[-|]+\n((?:\|.*\n)+)", MATHS.read_text())
    named = [(group, row.split("`")[1]) for group, body in rows for row in body.splitlines()]
    assert len(named) > 20
    assert [f"{g}={n}" for g, n in named if not (CONF / g / f"{n}.yaml").exists()] == []


def is_key(name):
    """Not a file, such as trainer.py."""
    return name.partition(".")[0] in GROUPS and not name.endswith((".py", ".yaml"))


@functools.cache
def trees(folder):
    return [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")]


def is_option(parts):
    """A key of one of the roots, or of one of the options of the group that it begins with, as objective/perceptual."""
    found = [(tree, parts[i:]) for i in range(len(parts)) for tree in trees(CONF.joinpath(*parts[:i]))]
    return any(reaches(tree, rest) or reaches(tree, parts) for tree, rest in found)  # the second: @package _global_


def reaches(tree, parts):
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def test_a_wrong_name_is_found():
    """The checks above can fail."""
    assert CHOICE.findall("engine=zero2 sampler=nosuch objective/adversary=patchgan 'conditioning=[text,hole]'") == [
        ("engine", "zero2"), ("sampler", "nosuch"), ("objective/adversary", "patchgan"),
        ("conditioning", "[text,hole]")]  # fmt: skip
    assert is_option(["objective", "prompt_dropout"])
    assert is_option(["training", "resume"])
    assert not is_option(["objective", "nosuch"])


def test_pages_with_formulas_survive_markdown():
    """Dollars come in pairs within a line, and no backslash escapes a punctuation mark, which Markdown would eat."""
    prose = re.sub(r"```math\n.*?```", "", MATHS.read_text(), flags=re.DOTALL)
    for line in prose.splitlines():
        formulas = re.sub(r"`[^`]*`", "", line).split("$")
        assert len(formulas) % 2 == 1, line
        assert not [f for f in formulas[1::2] if re.search(r"\\[^a-zA-Z]", f) or f != f.strip()], line


def script_of_docs(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


# The map.


@pytest.fixture(scope="module")
def architecture():
    yield from script_of_docs("draw_architecture")


def test_the_picture_of_the_folders_is_that_of_this_checkout(architecture):
    assert architecture.PICTURE.read_text() == architecture.drawn(), "run python docs/draw_architecture.py"


def test_each_folder_has_one_line_in_the_map(architecture):
    lines = re.findall(
        r"^\| `((?:train|data_pipeline)/\w+)/` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    there = {f"{package}/{name}" for package in architecture.PACKAGES for name in architecture.folders(package)}
    assert sorted(lines) == sorted(name for name in there if not name.endswith(architecture.ENTRIES))


def test_an_import_upward_is_refused_by_the_picture(architecture):
    with pytest.raises(ValueError, match="circle: a -> b -> a"):
        architecture.floors({"a": {"b"}, "b": {"a"}})


def test_arrows_that_follow_from_others_are_left_out(architecture):
    assert architecture.direct({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [("a", "b"), ("b", "c")]


# The plots.


@pytest.fixture(scope="module")
def plots():
    yield from script_of_docs("plots")


@pytest.mark.exhaustive
def test_plots_are_drawn(plots, tmp_path):
    drawn = [
        plot(tmp_path, counts=(5, 10)) if name == "convergence" else plot(tmp_path)
        for name, plot in plots.PLOTS.items()
    ]
    shown = {Path(to).name for _, to in links(MATHS) if to.endswith(".png")}
    assert {path.name for path in drawn} == shown
    assert shown == {path.name for path in (ROOT / "docs" / "maths").glob("*.png")}
    for path in drawn:
        assert path.stat().st_size < 60 * 1024
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 5  # not an empty sheet


def test_measured_orders_of_convergence(plots):
    vp = plots.option("process", "continuous_vp")
    errors = dict(plots.measured(vp, lambda _, n: plots.torch.linspace(1.0, 0.05, n + 1).double(), (40, 80)))
    orders = {name: float(np.log2(coarse / fine)) for name, (coarse, fine) in errors.items()}
    expected = {"ddpm": 0.95, "euler": 1.0, "ddim": 1.0, "heun": 2.0, "dpmpp_2m": 1.9, "unipc": 2.6}
    assert orders == pytest.approx(expected, abs=0.2)


def test_the_error_of_a_sampler_is_what_many_draws_show(plots):
    """Of DDPM in ten steps, against 200,000 draws."""
    torch, data = plots.torch, plots.GaussianData()
    process, function = plots.option("process", "rectified_flow"), plots.SAMPLERS["ddpm"]
    times = plots.samplers.uniform_times(process, 10).double()
    random = torch.Generator().manual_seed(0)

    def normal(step=None):
        return torch.randn((200_000, 1, 1, 1), generator=random, dtype=torch.float64)

    mean, std = data.marginal(process, times[0])
    x = function(data.denoiser(process), mean + std * normal(), times, process, normal)
    drawn = float(((x.mean() - data.mean).square() + (x.std() - data.std).square()).sqrt())
    assert data.error(function, process, times) == pytest.approx(drawn, abs=5 * data.std / 200_000**0.5)
