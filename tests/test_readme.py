"""README: its commands parse, its files exist, and CI runs the very line it prints."""
import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import shlex
import sys

import pytest
import torch

import evidence
from conftest import ROOT

RAW = README = (ROOT / "README.md").read_text()
for name, command in re.findall(r'^([A-Z])="(.*)"$', README, re.M):       # a command that the lines behind it extend
    README = re.sub(rf"\${name}\b", lambda _: command, README.replace(f'{name}="{command}"', ""))
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
            if re.search(r"(?<!diff )\b\w+\.py", line) and not line.startswith("diff") and "tests/" not in line]

COMMANDS += [f"python {command}".replace("--dataset D", "--dataset cifar100") for command in re.findall(r"^\| `(\w+_sc\.py --dataset [^`]+)`", README, re.M)]


def test_first_screen_has_two_commands():
    """One line installs and runs the main job, one installs and runs the tests."""
    first = re.findall(r"```bash\n(.*?)\n```", "\n".join(README.splitlines()[:30]), re.S)
    assert len(first) == 2 and first[0].endswith("python uvit_sc.py") and first[1].endswith("python -m pytest -q tests")
    assert all("pip install -r requirements.txt" in command and "\n" not in command for command in first)


def test_ci_runs_the_readme():
    """The line that .ci/run takes from README is the test command."""
    line = next(line for line in README.splitlines() if "python -m pytest" in line)
    assert line.startswith("python3 -m venv .venv") and "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    """Every flag of every command exists (nothing is run)."""
    words = shlex.split(command.split("&&")[-1])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    arguments = [word for word in words[script + 1:] if word != "--encode"]
    module = importlib.import_module(words[script].removesuffix(".py"))
    if words[script].endswith("_sc.py"):
        given, args = module.parse_command_line(arguments)
        assert args.sample or module.make_config(**given)
    else:
        module.parse_command_line(arguments)


def test_pictures_and_links_exist():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^##+ (.*)$", README, re.M)}
    for path in re.findall(r"(?:\]\(|href=\")(?!http)([^)\"]+)[)\"]", README):
        assert path[1:] in anchors if path.startswith("#") else (ROOT / path).exists(), path


def test_idea_is_quoted():
    """The lines that README shows as the idea stand in the scripts, in this order."""
    quotes = re.findall(r"<!-- quote (\w+\.py) -->\n```python\n(.*?)```", README, re.S)
    assert [name for name, _ in quotes] == ["edm_sc.py", "uvit_sc.py"]
    for name, text in quotes:
        lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
        place = -1
        for line in filter(None, map(str.strip, text.splitlines())):
            place = lines.index(line, place + 1)


def test_python_blocks_are_python():
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        compile(block, "README.md", "exec")


def test_map_of_the_paper():
    """Every equation, table and figure has a place, and what is named there exists."""
    rows = [row for row in re.search(r"### Where the paper is\n(.*?)\n## ", README, re.S)[1].splitlines() if row.startswith("| ")][1:]
    paper = " ".join(row.split("|")[1] for row in rows)
    for name in [f"Eq. ({i})" for i in (1, 2)] + [f"Table {i}" for i in range(1, 12)] + [f"Fig. {i}" for i in range(1, 9)]:
        assert re.search(re.escape(name) + r"(?!\d)", paper), name
    fields = {f.name for module in map(importlib.import_module, ("edm_sc", "uvit_sc")) for f in dataclasses.fields(module.Config)}
    named = 0
    for code in re.findall(r"`([^`]+)`", "".join(rows)):
        if match := re.fullmatch(r"(\w+_sc|probe|fid)\.([\w.]+)(?<!\.py)", code):
            functools.reduce(getattr, match[2].split("."), importlib.import_module(match[1]))
            named += 1
        elif code.startswith("--") and code.split()[0] not in ("--sample",):
            assert code.split()[0][2:] in fields, code
    assert named > 30


@pytest.mark.parametrize("script, dataset, backbone", [("edm_sc", "cifar100", "ddpm"), ("ddpm_sc", "cifar10", "ddpmpp"), ("uvit_sc", "cifar100", "uvit_s"),
                                                       ("edm_sc", "tiny_imagenet", "ddpm"), ("dit_latent_sc", "imagenet", "dit_b")])
def test_costs(script, dataset, backbone):
    """EFLOP of the tables: counted for one image, times images and epochs."""
    from torch.utils.flop_counter import FlopCounterMode
    module = importlib.import_module(script)
    images = dict(cifar10=50_000, cifar100=50_000, tiny_imagenet=100_000, imagenet=1_281_167)[dataset]
    cfg = module.make_config(dataset, backbone=backbone, **dict(uncond=True, layer="block_9") if script.startswith("dit") else {})
    with torch.device("meta"):
        net = module.build_net(cfg)
        x, t = torch.empty(1, *((32, 16, 16) if script.startswith("dit") else (3, cfg.size, cfg.size))), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            net(x, t).sum().backward()
    cost = counter.get_total_flops() * images * cfg.epochs / 1e18
    name = dict(cifar10="D", cifar100="D", tiny_imagenet="D", imagenet="imagenet")[dataset]
    rows = re.findall(rf"^\| `{script}.py --dataset {name}\b.*?` \| (\d[\d.]*)[, \d]* \|", README, re.M)
    assert any(abs(float(said) / cost - 1) < 0.03 for said in rows), (cost, rows)


def test_tables_of_the_evidence():
    """README's tables are those of assets/results/, and each result has the commands that made it."""
    assert evidence.fill(RAW) == RAW and "<!-- evidence" in RAW
    for (name, seed), result in evidence.results().items():
        assert result["commands"] == evidence.commands(name, seed)


def test_findings_have_their_numbers_from_the_tables():
    """Each "mean ± half" of the prose is a cell of the tables, rounded; its sign is in the words."""
    prose = re.search(r"### What we found\n(.*?)\n### ", RAW, re.S)[1]
    cells = [tuple(map(float, pair)) for pair in re.findall(r"[+-]([\d.]+) ± ([\d.]+)", RAW)]
    found = re.findall(r"([\d.]*\d) ± ([\d.]*\d)", prose)
    assert len(found) > 8
    for pair in found:
        near = lambda said, value: abs(float(said) - value) <= 0.5001 * 10 ** -len(said.partition(".")[2])
        assert any(all(map(near, pair, cell)) for cell in cells), pair


def test_chance_tells_contrast_from_cls():
    text = "| `uvit cls` | **-1.0 ± 0.5** | +1.0 ± 2.0 |\n| `uvit cls cl` | **+2.0 ± 1.0** |\n| `edm none aug` | -2.0 ± 3.0 |\n| `uvit cls` | **-1.0 ± 0.5** | +1.0 ± 2.0 |"
    said = evidence.chance(text)
    assert said.startswith("Of the 4 differences with an interval, 2 are bold, 1 of them in rows with augmentation or contrast. Of the other 2, 1 are bold;")


def test_pairs_together(monkeypatch):
    """Gains of 1, 2 and 6 points with three scripts: far apart as pairs, and the same in each seed's mean. And with seeds that differ: as
    three means, of which 0.4, 0.5 and 0.6 exclude 0."""
    gains, rows = dict(edm=1, ddpm=2, rf=6), {}
    for model, seed in itertools.product(gains, range(3)):
        for word, gain in (("none", 0), ("adaptive", gains[model]), ("add", (4 + seed) / 10)):
            rows[f"{model} {word}", seed] = dict(loss=1 + gain / 100, accuracy=50 + gain, ridge=60, knn=70, fd_tiny=9)
    rows |= {(f"{name}{more}", seed): dict(loss=1, accuracy=50, ridge=60, knn=70, fd_tiny=9) for seed in range(3) for name, more in (
        *itertools.product(("edm none", "edm adaptive"), (" aug", " aug cl")), *itertools.product(("uvit none", "uvit cls"), ("", " aug")),
        ("uvit none", " cl gap"), ("uvit none", " aug cl gap"), ("uvit cls", " cl"), ("uvit cls", " aug cl"))}
    monkeypatch.setattr(evidence, "results", lambda: rows)
    table = evidence.table_together().splitlines()
    assert "| 9 | **+3.00 ± 1.76 (0.00)** | **+3.00 ± 1.76 (0.00)** | +0.00 ± 0.00 (0.00) |" in table[2]
    assert "| 9 | **+0.50 ± 0.07 (0.25)** | **+0.50 ± 0.07 (0.25)** |" in table[3] and "| 12 | +0.00 ± 0.00 (0.00) |" in table[5]


@pytest.mark.parametrize("arrangement", evidence.ARRANGEMENTS)
def test_arrangements(arrangement, tmp_path, monkeypatch):
    """The edited scripts have as many parameters as the one that they compare with, and compute something else."""
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    for file in ("edm_sc.py", "probe.py", "fid.py"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    evidence.prepare(arrangement)
    spec = importlib.util.spec_from_file_location(f"edm_{arrangement}", tmp_path / f"runs/evidence/arrangement{arrangement}/edm_sc.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    nets = []
    for script in (module, importlib.import_module("edm_sc")):
        torch.manual_seed(0)
        nets.append(script.build_net(script.make_config("glyphs")))
    x, c = torch.randn(2, 3, 16, 16), torch.randn(2)
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts[0] == counts[1] if arrangement != "narrow" else counts[0] < counts[1] / 2
    outs = [net(x, c) for net in nets]
    gradients = [torch.autograd.grad(out.square().sum(), net.image_proj.weight)[0] for out, net in zip(outs, nets)]
    assert not torch.allclose(gradients[0], gradients[1]) and torch.equal(outs[0], outs[1]) == (arrangement == "detach")


@pytest.mark.parametrize("script, options", [("edm_sc", {}), ("dit_latent_sc", {}), ("uvit_sc", {}), ("uvit_sc", dict(self_cond="none"))])
def test_exchange(script, options):
    """Images 0 and 1, 2 and 3 exchange conditions: predictions change where the two images differ, and nowhere else."""
    module = importlib.import_module(script)
    torch.manual_seed(0)
    net = module.build_net(module.make_config("glyphs", **options)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    C, S = net.x_embedder.proj.in_channels if script == "dit_latent_sc" else 3, 4 if script == "dit_latent_sc" else 16
    x, t = torch.randn(4, C, S, S), torch.full((4,), 0.3)
    x[1] = x[0]
    with torch.no_grad():
        own = net(x, t)
        assert evidence.exchange(net)
        other = net(x, t)
    assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(own, other)] == [True, True, False, False]


def test_loss_of_exchanged_conditions(tmp_path, monkeypatch):
    """measure_loss: two by two at one time where conditions are exchanged, and times and noise that do not depend on the network."""
    edm_sc, seen = importlib.import_module("edm_sc"), []
    true_loss, true_load = edm_sc.EDM.loss, edm_sc.load_data
    monkeypatch.setattr(edm_sc.EDM, "loss", lambda self, net, x, t, noise: seen.append((t, noise)) or true_loss(self, net, x, t, noise))
    monkeypatch.setattr(edm_sc, "load_data", lambda cfg, train: tuple(part[:40] for part in true_load(cfg, train)))
    for method in ("adaptive", "none"):
        cfg = edm_sc.make_config("glyphs", self_cond=method)
        edm_sc.write_checkpoint(tmp_path / f"{method}.pt", script="edm_sc", config=vars(cfg), step=0, ema=edm_sc.build_net(cfg).state_dict())
        evidence.measure_loss(tmp_path / f"{method}.pt")
        result = json.loads((tmp_path / "loss.json").read_text())
        assert (result["exchanged"] is None) == (method == "none") and len(result["by_time"]) == 4
    whole, own, others, whole_none, own_none = seen
    assert not torch.equal(whole[0][::2], whole[0][1::2]) and torch.equal(whole[0].sort()[0][::2], own[0][::2])
    for t, noise in (own, others):
        assert torch.equal(t[::2], t[1::2]) and torch.equal(noise, own[1])
    assert torch.equal(whole[0], whole_none[0]) and torch.equal(whole[1], whole_none[1])


def test_exchange_needs_a_condition():
    module = importlib.import_module("edm_sc")
    assert not evidence.exchange(module.build_net(module.make_config("glyphs", self_cond="none")))
