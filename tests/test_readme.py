"""README and the pages behind it: commands parse, quotations and names exist, links lead on."""
import functools, importlib, json, re, shlex, statistics

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text("utf-8") for path in FILES}


def commands():
    """The commands of all pages that start a script, with the words that an S="..." stands for."""
    found = []
    for name, text in PAGES.items():
        short = dict(re.findall(r'^([A-Z])="(.*)"$', text, re.M))
        blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in "\n".join(blocks).splitlines():
            for letter, words in short.items():
                line = line.replace(f"${letter} ", f"{words} ")
            line = line.split("#")[0].split("&&")[-1].strip()
            script = re.match(r"(python|torchrun|srun) .*\b(\w+_sc|probe|fid)\.py", line)
            if script and not line.endswith("--help"):
                found.append(line)
        for row in re.findall(r"^\| (?:\(\w\) )?`(\w+_sc\.py --dataset [^`]+)`", text, re.M):
            found.append(f"python {row}".replace("--dataset D", "--dataset cifar100"))
    return sorted(set(found))


def test_first_screen_has_two_commands():
    first = re.findall(r"```bash\n(.*?)\n```", "\n".join(README.splitlines()[:24]), re.S)
    assert len(first) == 2 and first[0].endswith("_sc.py")
    assert first[1].endswith("python -m pytest -q tests")
    assert all("pip install -r requirements.txt" in command for command in first)


def test_ci_runs_the_readme():
    """The line that .ci/run takes from README is the test command."""
    line = next(line for line in README.splitlines() if "python -m pytest" in line)
    assert line.startswith("python3 -m venv .venv")
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci/run").read_text()


def test_size():
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 20_000 and "<<" not in README


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    """Every flag of every command exists, and its value is one that the script takes."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if re.fullmatch(r"(\w+_sc|probe|fid)\.py", word))
    module = importlib.import_module(words[at].removesuffix(".py"))
    arguments = [word for word in words[at + 1:] if word not in ("--encode", "&")]
    if words[at].endswith("_sc.py"):
        given, args = module.parse_command_line(arguments)
        assert args.sample or module.make_config(**given)
    else:
        text = (ROOT / words[at]).read_text()
        for word in arguments:
            if word.startswith("--") and "--script" not in arguments:
                assert f'"{word.replace("-", "_").replace("__", "--", 1)}"' in text, word


def test_links_and_pictures_exist():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        for path in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            file, _, anchor = path.partition("#")
            assert (folder / file).exists() if file else anchor in anchors, f"{name}: {path}"


def test_every_page_is_linked_once():
    for name in PAGES:
        if name != "README.md":
            assert f"](docs/{name})" in README, name


def test_idea_is_quoted():
    """The lines that README shows as the idea stand in the scripts, in this order."""
    quotes = re.findall(r"<!-- quote (\w+\.py) -->\n```python\n(.*?)```", README, re.S)
    assert [name for name, _ in quotes] == ["edm_sc.py", "uvit_sc.py"]
    for name, text in quotes:
        lines = [" ".join(line.split()) for line in (ROOT / name).read_text().splitlines()]
        place = -1
        for line in text.splitlines():
            place = lines.index(" ".join(line.split()), place + 1)


def test_python_blocks_are_python():
    for text in PAGES.values():
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            compile(block, "README.md", "exec")


def test_probe_of_your_own_features(capsys):
    """README's lines find a feature that tells three classes apart, and say so."""
    block = re.search(r"```python\n(import argparse, probe.*?)```", README, re.S)[1]
    labels = torch.arange(60) % 3
    f = F.one_hot(labels, 5) + 0.1 * torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(60)
    exec(block, dict(f=f, labels=labels, train_rows=rows[:40], test_rows=rows[40:]))
    assert capsys.readouterr().out == "[100.0]\n"


def test_gpu_page_has_the_measured_tables(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(PAGES["gpu.md"])
    importlib.import_module("bench").write_tables(page)
    assert page.read_text() == PAGES["gpu.md"]


def test_claim(tmp_path, monkeypatch):
    """The planned evidence: tables are those of its results, verdicts those of its plan."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    evidence = importlib.import_module("evidence")
    for name in ("README.md", "docs/evidence.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    evidence.tables()
    for name in ("README.md", "docs/evidence.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name
    spread = [-2, -1, 0, 1, 2] * 2
    cases = {"held": -9, "not held": 9, "undecided": -0.5, "undecided: a run failed": float("nan")}
    for expected, middle in cases.items():
        values = [5 * x + middle for x in spread]
        assert evidence.verdict("1a", values).strip("*") == expected
    assert evidence.verdict("1a", [x - 0.5 for x in spread]) == "**not held**"     # too small
    assert evidence.verdict("3a", [x + 2 for x in spread]) == "**held**"


def test_picture_of_the_claim(monkeypatch):
    """The strips have a point where a seed is, and none are drawn before all seeds are in."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    evidence = importlib.import_module("evidence")
    lines = [dict(name=name, seed=seed, fd_tiny=2.0 ** seed)
             for name, (_, seeds) in evidence.RUNS.items() for seed in range(seeds)]
    monkeypatch.setattr(evidence, "read_results", lambda: lines)
    image = evidence.strip_plot(width=770, left=160)
    for seed in range(12):
        assert image.getpixel((160 + round(seed / 11 * 590), 17)) == (0x99, 0x99, 0x99)
    lines.pop(0)
    with pytest.raises(AssertionError, match="missing"):
        evidence.strip_plot()


def test_map_of_the_paper():
    """Every equation, table and figure has a place, and what is named there exists."""
    section = re.search(r"## Where the paper is\n(.*?)\n## ", README, re.S)[1]
    rows = [row for row in section.splitlines() if row.startswith("| ")][1:]
    paper = " ".join(row.split("|")[1] for row in rows)
    names = [f"Eq. ({i})" for i in (1, 2)] + [f"Table {i}" for i in range(1, 12)]
    for name in names + [f"Fig. {i}" for i in range(1, 9)]:
        assert re.search(re.escape(name) + r"(?!\d)", paper), name
    flags = set(importlib.import_module("edm_sc").FIELDS) | {"sample"}
    flags |= set(importlib.import_module("uvit_sc").FIELDS)
    for code in re.findall(r"`([^`]+)`", "".join(rows)):
        if match := re.fullmatch(r"(\w+_sc|probe|fid)\.([\w.]+)(?<!\.py)", code):
            functools.reduce(getattr, match[2].split("."), importlib.import_module(match[1]))
        elif code.startswith("--"):
            assert code.split()[0][2:] in flags, code


def test_tables_are_those_of_the_results():
    """A row with four plain values has loss, probe, ridge and FD-tiny, over its seeds."""
    results = {}
    for file in (ROOT / "docs/results/runs.jsonl", ROOT / "docs/results/retrofit.jsonl"):
        for run in map(json.loads, file.read_text().splitlines()):
            results.setdefault(run["name"], []).append(run)
    rows = re.findall(r"^\| `([^`]+)` (\|.*)", PAGES["evidence.md"], re.M)
    rows = [(name, re.findall(r"\| ([\d.]+) ± ([\d.]+) ", line)) for name, line in rows]
    rows = [(name, values) for name, values in rows if len(values) == 4]
    for name, values in rows:
        for key, value in zip(("loss", "accuracy", "ridge", "fd_tiny"), values):
            numbers, digits = [run[key] for run in results[name]], 5 if key == "loss" else 2
            found = statistics.mean(numbers), statistics.stdev(numbers)
            assert [f"{number:.{digits}f}" for number in found] == list(value), (name, key)
    assert len(rows) > 50
