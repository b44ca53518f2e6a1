"""README: its commands parse, its files exist, and CI runs the very line it prints."""
import importlib
import re
import shlex

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SHORT = re.search(r'^S="(.*)"$', README, re.M)[1]        # a command that the lines behind it extend
README = re.sub(r"\$S\b", lambda _: SHORT, README.replace(f'S="{SHORT}"', ""))
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
            if re.search(r"(?<!diff )\b\w+\.py", line) and not line.startswith("diff")]


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
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
