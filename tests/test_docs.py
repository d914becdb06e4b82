"""The README and the documentation: every block of Python runs as it stands there, but for the
number of steps; every link leads somewhere; every public name is in the reference."""

import functools
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eqxmeta as em
import eqxmeta.callbacks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# A line of the README is too long to train: these are what a page trains with in a test.
SHORTER = [
    (r"\bsize=(32|84)\b", "size=16"),
    (
        r"em\.nn\.Conv4\(3, (ways=)?None, size=16(, width=32)?",
        "em.nn.Conv4(3, None, size=16, width=4",
    ),
    (r"\(3, 32, 32\)", "(3, 16, 16)"),
    (r"\bsteps=(\d+_\d{3}|\d{2,})\b(?=\)|, resume)", "steps=10"),
    (r"\bevery=\d+\b", "every=5"),
    (r"\bnum_tasks=\d+\b", "num_tasks=8"),
    (r"StopWhenStill\(100", "StopWhenStill(5"),
    (r"\btrain\(strategy, steps=10_000\)", "train(strategy, steps=10)"),
]


@pytest.fixture
def photographs(tmp_path):
    """A folder of 40 classes, and the files that the README names."""
    rng = np.random.default_rng(0)
    for name in ("Avocado", "Banana", "Kiwi", *(f"class{number}" for number in range(37))):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        pattern = rng.integers(0, 256, (8, 8, 3))
        for image in range(16):
            pixels = np.clip(pattern + rng.normal(0, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    for name in ("a", "b", "c", "new"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if blocks(text)])
def test_blocks_run_in_order(page, photographs, monkeypatch):
    monkeypatch.chdir(photographs)
    namespace = {"__name__": "docs"}
    for block in blocks(TEXTS[page]):
        for pattern, shorter in SHORTER:
            block = re.sub(pattern, shorter, block)
        exec(compile(block, page, "exec"), namespace)


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].split()) <= 900


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (folder / link).exists(), link
    for example in re.findall(r"examples/\w+\.py", text):
        assert (ROOT / example).is_file(), example


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in TEXTS:
        if page != "README.md":
            assert page.removeprefix("docs/") in nav, page


def public_names():
    modules = {f"eqxmeta.{n}": getattr(em, n) for n in ("losses", "rules", "tasks", "data", "nn")}
    modules |= {"eqxmeta": em, "eqxmeta.callbacks": eqxmeta.callbacks}
    for where, module in modules.items():
        for name, value in vars(module).items():
            own = where == "eqxmeta" or getattr(value, "__module__", "").startswith("eqxmeta")
            inner = where != "eqxmeta" and name.startswith("check_")
            if own and not inner and name[0] != "_" and not inspect.ismodule(value):
                yield f"{where}.{name}"


def test_every_public_name_is_in_the_reference_once():
    pages = "\n".join(text for page, text in TEXTS.items() if "reference/" in page)
    told = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(told) == len(set(told))
    assert set(told) == set(public_names())
    for name in told:
        functools.reduce(getattr, name.split(".")[1:], em)


@pytest.mark.parametrize("marker", ["run", "test"])
def test_commands_name_what_exists(marker):
    _, _, rest = TEXTS["README.md"].partition(f"<!-- command: {marker} -->\n```bash\n")
    command, _, _ = rest.partition("\n```")
    assert "\n" not in command
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for part in command.split(" && "):
        words = shlex.split(part)
        if words[0].endswith("pip"):
            assert re.fullmatch(r"\.\[(\w+)\]", words[-1])[1] in extras
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize("name, page", [("strategy", "strategies"), ("callback", "callbacks")])
def test_examples_that_are_read_in_the_docs_are_the_examples(name, page):
    source = (ROOT / f"examples/custom_{name}.py").read_text()
    (body,) = re.findall(r"^class .*?(?=^def main)", source, re.DOTALL | re.MULTILINE)
    assert body.strip() in TEXTS[f"docs/{page}.md"]
