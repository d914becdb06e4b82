"""An exported learner at work, without the code of its model.

    python examples/deploy.py learner.eqx --classes new_classes --photo what_is_this.jpg

`learner.eqx` is what `em.export("learner.eqx", learner, ways=5, shots=3)` wrote; `new_classes` has
a folder with a few photographs for each class, which may be classes that training never saw.
"""

import argparse
from pathlib import Path

import eqxmeta as em


def main():
    parser = argparse.ArgumentParser(description="Name a photograph by a few others.")
    parser.add_argument("learner", type=Path, help="what em.export wrote")
    parser.add_argument("--classes", type=Path, required=True, help="a folder for each class")
    parser.add_argument("--photo", type=Path, required=True)
    args = parser.parse_args()
    learner = em.load_exported(args.learner)
    folders = sorted(folder for folder in args.classes.iterdir() if folder.is_dir())
    classes = {folder.name: sorted(folder.iterdir())[: learner.shots] for folder in folders}
    for name, probability in learner.adapt(classes)(args.photo):
        print(f"{probability:6.1%}  {name}")


if __name__ == "__main__":
    main()
