"""Runs every script in examples/ and writes docs/gallery.md with the pictures that they draw.

``make gallery``. Each script writes PNG files into ``examples/output/``; they come out here shrunk to at most
160 kB, under ``docs/_static/gallery/``. The text of a card is the script's docstring, and below it what the
script printed.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
OUTPUT = EXAMPLES / "output"
PICTURES = ROOT / "docs" / "_static" / "gallery"
PAGE = ROOT / "docs" / "gallery.md"
LIMIT = 160_000
FIRST = ("quickstart.py", "train_digits.py")

HEAD = """# Gallery

The scripts in `examples/`, what they print and what they draw. From a checkout, with the `examples` extra
installed (SciPy, scikit-learn, matplotlib), each runs in about a minute: `python examples/NAME.py`. This page
is made by running them (`make gallery`).
"""


def run(script: Path) -> tuple[str, list[Path], float]:
    """What the script printed, the pictures it wrote, and the seconds it took."""
    OUTPUT.mkdir(exist_ok=True)
    start = time.time()
    environment = {**os.environ, "MPLBACKEND": "Agg", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script.name} failed:\n{done.stderr[-2000:]}")
    pictures = [p for p in sorted(OUTPUT.rglob("*.png")) if p.stat().st_mtime >= start - 1]
    return done.stdout.replace(f"{ROOT}{os.sep}", ""), pictures, time.time() - start


def shrink(picture: Path, target: Path) -> None:
    """A copy of at most 160 kB: fewer colors first, then fewer pixels."""
    from PIL import Image

    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    if image.width > 1100:
        image = image.resize((1100, round(image.height * 1100 / image.width)), Image.Resampling.LANCZOS)
    for colors in (256, 128, 64, 32):
        buffer = io.BytesIO()
        image.quantize(colors).save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= LIMIT:
            break
        if colors == 64:
            image = image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)
    if buffer.tell() > LIMIT:
        raise RuntimeError(f"{picture.name} can't be made smaller than {buffer.tell()} bytes")
    target.write_bytes(buffer.getvalue())


def prose(text: str) -> str:
    """A docstring's paragraphs as Markdown; what is indented there is code."""
    blocks = []
    for block in text.strip("\n").split("\n\n"):
        if all(line.startswith("    ") for line in block.splitlines()):
            code = textwrap.dedent(block)
            block = f"```{'bash' if code.startswith('python ') else 'text'}\n{code}\n```"
        blocks.append(block.replace("``", "`") if not block.startswith("```") else block)
    return "\n\n".join(blocks)


def describe(script: Path) -> tuple[str, str]:
    """The first line of a script's docstring, and the rest."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem
    title, _, rest = text.partition("\n\n")
    return " ".join(title.split()).rstrip("."), rest


def section(script: Path) -> str:
    """The part of the page about one script."""
    title, rest = describe(script)
    printed, pictures, seconds = run(script)
    lines = [f"(example-{script.stem})=", f"## {title}", "", f"`examples/{script.name}`", ""]
    if rest.strip():
        lines += [prose(rest), ""]
    for picture in pictures:
        name = f"{script.stem}-{picture.stem}.png" if picture.stem != script.stem else picture.name
        shrink(picture, PICTURES / name)
        lines += [f"![{title}: {picture.stem}](_static/gallery/{name}){{.plot}}", ""]
    kept = [line.rstrip() for line in printed.splitlines() if "\r" not in line]
    if len(kept) > 40:
        kept = [*kept[:30], "...", *kept[-8:]]
    lines += [":::{dropdown} What it prints", "```text", *kept, "```", ":::", ""]
    print(f"{script.name}: {seconds:.0f} s, {len(pictures)} pictures", flush=True)
    return "\n".join(lines)


def cards(sections: dict[str, str]) -> str:
    """The examples that draw something, as pictures to choose from."""
    lines = ["::::{grid} 2 2 3 3", ":gutter: 2", ""]
    for name, text in sections.items():
        picture = re.search(r"\]\((_static/gallery/[^)]+)\)", text)
        if picture is None:
            continue
        lines += [":::{grid-item-card}", f":img-top: {picture[1]}", f":link: example-{Path(name).stem}"]
        lines += [":link-type: ref", ":class-img-top: plot", "", describe(EXAMPLES / name)[0], ":::", ""]
    return "\n".join([*lines, "::::", ""])


def main() -> int:
    """All scripts, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="scripts to run again; the other parts of the page are kept")
    names = parser.parse_args().names
    PICTURES.mkdir(parents=True, exist_ok=True)
    kept = existing_sections()
    sections = {}
    for script in sorted(EXAMPLES.glob("*.py"), key=lambda script: (script.name not in FIRST, script.name)):
        if names and script.stem not in names and script.name in kept:
            sections[script.name] = kept[script.name]
        else:
            sections[script.name] = section(script)
    PAGE.write_text("\n".join([HEAD, cards(sections), *sections.values()]), encoding="utf-8")
    return 0


def existing_sections() -> dict[str, str]:
    """What is on the page already, by script."""
    if not PAGE.exists():
        return {}
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n(example-")[1:]:
        name = re.search(r"^`examples/(.+)`$", part, re.MULTILINE)
        if name is not None and (EXAMPLES / name[1]).exists():
            found[name[1]] = "(example-" + part.rstrip("\n") + "\n"
    return found


if __name__ == "__main__":
    sys.exit(main())
