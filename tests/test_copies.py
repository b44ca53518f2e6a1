"""Same name, same text: what two scripts share is one text, so that a diff of two scripts shows
what they are about. And what no file may do."""
import ast, difflib, itertools, re

import pytest

from conftest import ROOT, SCRIPTS

MAY_DIFFER = {"Config", "RECIPES"}      # a field that two Configs share keeps its type and comment
PAIRS = list(itertools.combinations(SCRIPTS, 2))


def definitions(script):
    """{name: text} of the functions, classes and constants at the top level."""
    text = (ROOT / f"{script}.py").read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign):                    # the lines that choose are no Name
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        for name in names:
            found[name] = "\n".join(lines[first - 1:node.end_lineno])
    return found


@pytest.mark.parametrize("one, two", PAIRS)
def test_same_name_same_text(one, two):
    a, b = definitions(one), definitions(two)
    differ = [name for name in a.keys() & b.keys() - MAY_DIFFER if a[name] != b[name]]
    assert not differ
    assert {"train", "sample", "features", "make_config", "main", "load_checkpoint"} <= a.keys()


@pytest.mark.parametrize("one, two", PAIRS)
def test_shared_fields_keep_their_type(one, two):
    fields = [dict(re.findall(r"^    (\w+): (\w+) = ", definitions(name)["Config"], re.M))
              for name in (one, two)]
    for name in fields[0].keys() & fields[1].keys():
        assert fields[0][name] == fields[1][name], name


@pytest.mark.parametrize("other", ["edm_sc", "rf_sc"])
def test_the_diff_shows_the_formulation_and_nothing_else(other):
    """The lines in which ddpm_sc.py and another UNet script differ: docstring, settings, section
    3."""
    texts = [(ROOT / f"{name}.py").read_text().splitlines() for name in ("ddpm_sc", other)]

    def place(lines, i):
        if i <= lines.index('"""'):
            return "docstring"
        banners = [line for line in lines[:i + 1] if line.startswith("# ---- ")]
        return banners[-1][7:9] if banners else "imports"
    places = set()
    match = difflib.SequenceMatcher(None, *texts, autojunk=False)
    for kind, a, b, c, d in match.get_opcodes():
        if kind != "equal":
            places |= {place(texts[0], i) for i in range(a, b)}
            places |= {place(texts[1], i) for i in range(c, d)}
    assert places <= {"docstring", "1.", "3."}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_no_other_file(name):
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {*SCRIPTS, "probe", "fid"}


@pytest.mark.parametrize("name", [*SCRIPTS, "probe", "fid"])
def test_no_code_from_files_and_no_shell(name):
    """torch.load with weights_only alone; no eval, exec, pickle or shell; downloads by https."""
    text = (ROOT / f"{name}.py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
            assert called != "torch.load" or options.get("weights_only") == "True", node.lineno
            assert options.get("allow_pickle", "False") == "False" and "shell" not in options
    assert not re.search(r"^\s*(import|from) .*\b(pickle|subprocess|shelve|marshal)\b", text, re.M)
    assert not re.search(r"[\"']http://", text)
    if name != "dit_latent_sc":            # which says it behind a test for CUDA
        assert "non_blocking=True" not in text  # on MPS the copy would be read too early
