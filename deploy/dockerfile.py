"""The Dockerfile, read: its instructions with comments and continuations resolved."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Instruction:
    stage: str
    name: str
    rest: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """The instructions in order, each with the stage that it belongs to; every stage of the file has a name."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    instructions: list[Instruction] = []
    stage = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        instructions.append(Instruction(stage=stage, name=name, rest=rest.strip()))
    return instructions


def environment(instructions: list[Instruction], stage: str) -> dict[str, str]:
    """What ENV sets in a stage, references to other variables left as they are."""
    lines = [each.rest for each in instructions if (each.stage, each.name) == (stage, "ENV")]
    return dict(pair.split("=", 1) for line in lines for pair in shlex.split(line))
