"""Same name, same text: what two scripts share is one text, so that a diff of two scripts shows what they are about."""
import ast
import difflib
import importlib
import itertools
import re
import subprocess

import pytest

from conftest import ROOT, SCRIPTS

# Config and RECIPES hold different values (a shared field keeps its type and comment), the glue line different choices.
MAY_DIFFER = {"Config", "RECIPES", "SCRIPT", "Backbone", "Diffusion", "Weighting"}
# What pixel scripts define and the latent script gives other names and chooses in a second glue line; --encode.
GLUE_OF_LATENTS = {"load_data", "draw_view", "make_view", "draw_images", "main guard"}
PAIRS = list(itertools.combinations(SCRIPTS, 2))


def definitions(script):
    """{name: text} of the top-level functions, classes and constants, and what else stands at the top level."""
    text = (ROOT / f"{script}.py").read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign):
            names = [leaf.id for target in node.targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        for name in names or [f"line {node.lineno}"] * isinstance(node, (ast.If, ast.For, ast.With, ast.Try)):
            found[re.sub(r"line \d+", "main guard", name)] = "\n".join(lines[first - 1:node.end_lineno])
    return found


@pytest.mark.parametrize("one, two", PAIRS)
def test_same_name_same_text(one, two):
    a, b = definitions(one), definitions(two)
    for name in (a.keys() & b.keys()) - MAY_DIFFER - (GLUE_OF_LATENTS if "dit_latent_sc" in (one, two) else set()):
        assert a[name] == b[name], f"{name} differs between {one}.py and {two}.py"
    assert {"train", "sample", "features", "make_config", "main", "load_checkpoint"} <= a.keys() & b.keys()


@pytest.mark.parametrize("one, two", PAIRS)
def test_shared_fields_keep_type_and_comment(one, two):
    fields = [dict(re.findall(r"^    (\w+): (.*)$", definitions(name)["Config"], re.M)) for name in (one, two)]
    for name in fields[0].keys() & fields[1].keys():
        a, b = (re.sub(r"=.*?#", "#", field[name]).split() for field in fields)
        assert a == b, f"Config.{name} of {one}.py and {two}.py"


@pytest.mark.parametrize("one, two", PAIRS)
def test_comments_between_definitions_are_shared(one, two):
    """Comments at the left margin belong to no definition; those of shared blocks must agree too."""
    a, b = ({line for line in (ROOT / f"{name}.py").read_text().splitlines() if line.startswith("#")} for name in (one, two))
    for line in (a | b) - (a & b):
        owners = [name for name, lines in ((one, a), (two, b)) if line in lines]
        own = "2-6" if "dit_latent_sc" in (one, two) else "3-6"
        assert re.match(rf"# ---- [{own}]\. |# Dormand and Prince|# time_scale 1 for", line), f"{owners[0]}.py alone has: {line}"


@pytest.mark.parametrize("other", [name for name in SCRIPTS if name in ("edm_sc", "rf_sc")])
def test_the_diff_shows_the_formulation_and_nothing_else(other):
    """All lines in which ddpm_sc.py and another UNet script differ: docstring, Config and RECIPES, section 4, glue line."""
    texts = [(ROOT / f"{name}.py").read_text().splitlines() for name in ("ddpm_sc", other)]

    def place(lines, i):
        if i <= next(k for k, line in enumerate(lines) if line == '"""'):
            return "docstring"
        banner = [line for line in lines[:i + 1] if line.startswith("# ---- ")]
        return banner[-1][7:9] if banner else "imports"
    match = difflib.SequenceMatcher(None, *texts, autojunk=False)
    places = {place(texts[side], k) for _, a, b, c, d in match.get_opcodes() if _ != "equal"
              for side, span in ((0, range(a, b)), (1, range(c, d))) for k in span}
    assert places <= {"docstring", "1.", "4."}, places


def test_scripts_import_nothing_of_the_project():
    for name in SCRIPTS:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {*SCRIPTS, "probe", "fid"}
        importlib.import_module(name)


@pytest.mark.parametrize("other, words", [("edm_sc", r"(\d+) lines are replaced by (\d+)"), ("rf_sc", r"rectified flow: (\d+) by (\d+)")])
def test_readme_counts_the_lines_that_differ(other, words):
    out = subprocess.run(["diff", ROOT / "ddpm_sc.py", ROOT / f"{other}.py"], capture_output=True, text=True).stdout.splitlines()
    counted = [int(n) for n in re.search(words, (ROOT / "README.md").read_text()).groups()]
    assert counted == [sum(line.startswith(mark) for line in out) for mark in "<>"]
