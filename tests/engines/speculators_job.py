"""Loads or converts a drafter with speculators, inside its own environment: `speculators_job.py ACTION IN OUT TARGET`.

`resave` is `SpeculatorModel.from_pretrained` and `save_pretrained`; `convert` is speculators' own converter.
"""

import sys


def main(action, folder, output, target):
    if action == "resave":
        from speculators import SpeculatorModel

        model = SpeculatorModel.from_pretrained(folder)
        print(type(model).__name__)
        model.save_pretrained(output)
    elif action == "convert":
        from speculators.convert.entrypoints import convert_model

        convert_model(model=folder, verifier=target, algorithm="eagle3", output_path=output)


if __name__ == "__main__":
    main(*sys.argv[1:])
