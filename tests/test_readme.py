"""The examples of the README work: its Python code runs, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MILLRACE = str(Path(sys.executable).with_name("millrace"))


def blocks(language: str) -> list[str]:
    """Returns the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Returns the command lines of a program in the README's shell blocks, split into words, without comments."""
    joined = (block.replace("\\\n", " ") for block in blocks("sh"))
    lines = (line.partition("#")[0].split() for text in joined for line in text.splitlines())
    return [words for words in lines if words and words[0] == program]


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: re.search(r"\w+(?=\()", code)[0])
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip(), "a block shows what it did"


def test_first_commands_are_demo_and_test() -> None:
    assert [words[1] for words in commands("make")][:2] == ["demo", "test"]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {words[1] for words in commands("make")} <= targets


def test_command_line_options_exist() -> None:
    assert commands("millrace")
    for _, command, *words in commands("millrace"):
        result = subprocess.run(
            [MILLRACE, command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "200"},
        )
        for option in (word for word in words if word.startswith("--")):
            assert option in result.stdout, f"millrace {command} has no {option}"


def test_links_lead_somewhere() -> None:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README)]
    assert not [target for target in targets if "://" not in target and not (ROOT / target).exists()]
