"""Cards of the embedded targets, made from what was measured when they were trained.

Knows reports and text; measures nothing itself.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

LICENCE_NOTE = (
    "The weights are released under Apache-2.0. They were trained on the source code of the Python standard library, "
    "which is under the Python Software Foundation License Version 2; the model may reproduce fragments of it."
)

TARGET_TEMPLATE = """---
{{ card_data }}
---

{% if corpus == "stdlib" -%}
# Embedded {{ family }} target of ppow_hf

A small language model of Python, trained from nothing on the source of the standard library. It exists so that
drafters can be trained and speculative decoding can be tried and tested anywhere, without a download. What it writes
has the look of Python, is often wrong in its syntax, and is of no use as a program.
{%- else -%}
# Small {{ family }} target of ppow_hf

A small language model, trained from nothing on a file of texts, so that drafters and speculative decoding can be tried
on that kind of text. It knows nothing beyond its texts.
{%- endif %}

| | |
|---|---|
| parameters | {{ parameters }} |
| layers, hidden size, context | {{ recipe.num_layers }}, {{ recipe.hidden_size }}, 1,024 |
| tokens seen in training | {{ tokens_seen }} ({{ steps }} steps of {{ recipe.tokens_per_step }}) |
| held-in text | {{ held_in_tokens }} tokens, corpus fingerprint `{{ corpus_fingerprint }}` |
| held-out bits per byte | {{ bits_per_byte }} ({{ rows }} rows of 1,024 tokens from {{ unit }} never trained on) |

A tenth of the {{ unit }}, chosen by a hash of {{ hashed }}, was never trained on. {{ falling }}

![loss](loss.png)

Made with `ppow tiny-target --family {{ family }}{{ options }} --output-dir DIR`; the steps are in
`training_log.json`, the settings in `recipe.json`.

## What it writes

Greedy completions of {{ completed }}; `>>>` marks where the model begins. Greedy text of a model this
small loops, which flatters acceptance lengths: read them together with the share of repeated 8-grams.

{% for prompt, completion in samples %}
```text
{{ prompt }}>>>{{ completion }}
```
{% endfor %}
{%- if corpus == "stdlib" %}
## Licence

{{ licence_note }}
{% endif -%}
"""


def write_target_card(folder: str | Path, samples: list[tuple[str, str]]) -> None:
    """Write `README.md` from the folder's `recipe.json` and `training_log.json`, with (prompt, completion) samples."""
    folder = Path(folder)
    report = json.loads((folder / "recipe.json").read_text())
    log = json.loads((folder / "training_log.json").read_text())
    losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    family = report["recipe"]["family"]
    falling = (
        "The held-out loss was still falling when training ended: more steps would make it better."
        if len(losses) > 1 and losses[-1] < 0.99 * losses[-3 if len(losses) > 2 else 0]
        else "The held-out loss had stopped falling at this length of training."
    )
    corpus = report.get("corpus", "stdlib")
    _card(
        TARGET_TEMPLATE,
        folder,
        tags=["ppow", "python", "code"] if corpus == "stdlib" else ["ppow"],
        corpus=corpus,
        unit="modules" if corpus == "stdlib" else "texts",
        hashed="their names" if corpus == "stdlib" else "each",
        completed="functions of held-out modules" if corpus == "stdlib" else "the first lines of held-out texts",
        options="" if corpus == "stdlib" else f" --texts FILE --layers {report['recipe']['num_layers']}",
        family=family,
        parameters=f"{report['parameters']:,}",
        tokens_seen=f"{report['tokens_seen']:,}",
        held_in_tokens=f"{report['held_in_tokens']:,}",
        bits_per_byte=f"{report['held_out_bits_per_byte']:.3f}",
        rows=report["held_out_bits_per_byte_rows"],
        recipe=report["recipe"],
        steps=report["steps"],
        corpus_fingerprint=report["corpus_fingerprint"],
        falling=falling,
        samples=samples,
    )


def _card(template: str, folder: Path, tags: list[str], **values: Any) -> None:
    ours = values["corpus"] == "stdlib"
    data = ModelCardData(
        library_name="ppow_hf",
        license="apache-2.0" if ours else None,  # of others' texts its owner decides
        language="code" if ours else None,
        pipeline_tag="text-generation",
        tags=tags,
    )
    path = folder / ".template.md"
    path.write_text(template)
    try:
        card = ModelCard.from_template(data, template_path=str(path), licence_note=LICENCE_NOTE, **values)
        card.save(folder / "README.md")
    finally:
        path.unlink()
