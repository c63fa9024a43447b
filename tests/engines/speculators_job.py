"""Loads or converts a drafter with speculators, inside its own environment: `speculators_job.py ACTION IN OUT TARGET`.

`resave` is `SpeculatorModel.from_pretrained` and `save_pretrained`; `convert` is speculators' own converter.
"""

import json
import sys
from pathlib import Path


def main(action, folder, output, target):
    if action == "resave":
        from speculators import SpeculatorModel

        model = SpeculatorModel.from_pretrained(folder)
        print(type(model).__name__)
        model.save_pretrained(output)
    elif action == "convert":
        from speculators.convert.entrypoints import convert_model

        config = json.loads(Path(folder, "config.json").read_text())
        layers = config["eagle_aux_hidden_state_layer_ids"]  # the converter wants to be told, it does not look
        convert_model(
            model=folder,
            verifier=target,
            algorithm="eagle3",
            output_path=output,
            eagle_aux_hidden_state_layer_ids=layers,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
