"""Every block of code in the README runs as it stands there, but for the number of steps."""

import ast
import functools
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
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_name_what_exists():
    # What can be said of them without training: `test_python_blocks_run_in_order` is a slow one.
    named = set()
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"em(\.\w+)+", ast.unparse(node)):
                named.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("eqxmeta"):
                module = node.module.replace("eqxmeta", "em", 1)
                named |= {f"{module}.{alias.name}" for alias in node.names}
    assert {"em.MAML", "em.callbacks.Checkpoint"} <= named
    for name in named:
        functools.reduce(getattr, name.split(".")[1:], em)


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Few-shot images: noise around a pattern for each class.
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = tmp_path / "pngs" / ("train" if number < 5 else "test") / f"class{number}"
        folder.mkdir(parents=True)
        pattern = rng.integers(0, 256, (6, 6))
        for image in range(16):
            pixels = np.clip(pattern + rng.normal(0, 20, (6, 6)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    namespace = {"__name__": "readme"}
    for block in blocks("python"):
        # Smaller images and a few steps: matrix products are slow without XLA's optimisations.
        block = block.replace("episodes, steps=2_000", "episodes, steps=4")
        block = block.replace("size=28", "size=6").replace("28 * 28", "6 * 6")
        shorter = re.sub(r"steps=(20_000|2_000)\b", "steps=120", block)
        shorter = re.sub(r"every=1000\b", "every=60", shorter).replace(
            "num_tasks=600", "num_tasks=20"
        )
        exec(compile(shorter, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert float(re.search(r"accuracy (\S+)", out)[1]) > 0.3  # chance is 0.2
    assert "after 10 steps:" in out and "use gradient='mixed'" in out
    assert sorted(path.name for path in (tmp_path / "checkpoints/sine").iterdir()) == [
        "step-000000060.ckpt",
        "step-000000120.ckpt",
    ]
    assert list((tmp_path / "runs/sine").glob("*tfevents*"))
    task = namespace["Lines"]().sample(namespace["jax"].random.key(0))
    assert [leaf.shape for leaf in (*task.support, *task.query)] == [(10, 1)] * 4


@pytest.mark.parametrize("marker", ["run", "test"])
def test_commands_name_what_exists(marker):
    _, _, rest = README.partition(f"<!-- command: {marker} -->\n```bash\n")
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


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)|`(examples/\w+\.py)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / "".join(link)).exists()


@pytest.mark.parametrize("name", ["custom_strategy", "custom_callback"])
def test_examples_read_in_the_readme_are_the_examples(name):
    source = (ROOT / f"examples/{name}.py").read_text()
    (body,) = re.findall(r"^class .*?(?=^def main)", source, re.DOTALL | re.MULTILINE)
    assert body.strip() in README
