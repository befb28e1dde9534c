"""Writes the parts of README.md that are made from the code: the table of variants, the glossary of metrics and the file
tree.

Run by hand after a file or a metric was added: `.venv/bin/python scripts/readme_parts.py`. A test compares.
"""

import ast
import re
from pathlib import Path

from grpo_lab.recipe.presets import VARIANTS
from grpo_lab.tracking.metrics import DESCRIPTIONS, TIMING

ROOT = Path(__file__).resolve().parent.parent
LISTED = ("recipes", "rewards", "scripts", "grpo_lab")


def variants() -> str:
    """Every preset with the keys in which it differs from `grpo`, as a table."""
    rows = []
    for name, preset in VARIANTS.items():
        keys = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in preset.keys.items())
        rows.append(f"| `{name}` | {preset.idea} | {keys or 'the defaults'} | {preset.source} |")
    return "\n".join(["| preset | the idea | keys that differ from `grpo` | from |", "|---|---|---|---|", *rows])


def glossary() -> str:
    """Every metric and time with its meaning, as a table."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in {**DESCRIPTIONS, **TIMING}.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])


def tree() -> str:
    """Every file with the first sentence that it says of itself."""
    lines = []
    for top in LISTED:
        folder = None
        for path in sorted((ROOT / top).rglob("*"), key=lambda each: (str(each.parent), each.name)):
            about = first_sentence(path) if path.suffix in (".py", ".sh", ".yaml") else ""
            if not about or "__pycache__" in path.parts:
                continue
            if path.parent != folder:
                folder = path.parent
                lines.append(f"{folder.relative_to(ROOT)}/")
            lines.append(f"  {path.name:18} {about}")
    return "\n".join(["```", *lines, "```"])


def first_sentence(path: Path) -> str:
    """Of a Python file's docstring, or of the comment at the top of another file; "" if it says nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        about = "\n".join(line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    paragraph = " ".join(about.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)\]`])[.](?: |$)", paragraph)[0]


def with_parts(readme: str) -> str:
    """README.md with its made parts as they should be."""
    for name, content in (("variants", variants()), ("glossary", glossary()), ("tree", tree())):
        begin, end = f"<!-- {name}: made by scripts/readme_parts.py -->", f"<!-- end of {name} -->"
        before, _, rest = readme.partition(begin)
        readme = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return readme


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(with_parts(file.read_text(encoding="utf-8")), encoding="utf-8")
