"""`ppow calibrate` on the embedded pair: what it writes, what it leaves as it is, what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from ppow_hf import PPOWDrafter
from ppow_hf.cli import main
from ppow_hf.runtime.estimator import AcceptanceEstimator
from ppow_hf.tiny import drafter_path

SMALL = ["--fit-prompts", "3", "--num-prompts", "2", "--max-new-tokens", "32"]


@pytest.fixture
def uncalibrated(tmp_path) -> Path:
    folder = tmp_path / "drafter"
    shutil.copytree(drafter_path("tiny-standalone"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["calibration"] = None
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_drafter_that_nobody_calibrated_gets_estimates_and_costs_and_keeps_its_weights(
    uncalibrated, tmp_path, capsys
):
    out = tmp_path / "out"
    pair = ["--target", "tiny", "--drafter", str(uncalibrated)]
    assert main(["calibrate", *pair, "--output-dir", str(out), *SMALL]) == 0
    printed = capsys.readouterr().out
    speeds = re.findall(r"(before|now): (\d\.\d+) tokens per target forward's time on 2 other prompts", printed)
    assert [name for name, _ in speeds] == ["before", "now"] and all(float(speed) > 0.5 for _, speed in speeds)
    before = PPOWDrafter.from_pretrained(uncalibrated, dtype="auto")
    drafter = PPOWDrafter.from_pretrained(out, dtype="auto")
    assert before.config.calibration is None
    calibration = drafter.config.calibration
    assert set(calibration) == {"greedy", "sampling", "costs"} and calibration["greedy"]["observations"] > 50
    assert AcceptanceEstimator(**calibration["greedy"]["weights"]) != AcceptanceEstimator()
    assert drafter.dtype == before.dtype == torch.bfloat16
    for name, weights in before.state_dict().items():
        assert torch.equal(weights, drafter.state_dict()[name]), name
    assert (
        main(["bench", "--target", "tiny", "--drafter", str(out), "--num-prompts", "1", "--max-new-tokens", "8"]) == 0
    )


def test_a_drafter_is_calibrated_where_it_lies(uncalibrated):
    before = {path.name: path.read_bytes() for path in uncalibrated.iterdir()}
    pair = ["--target", "tiny", "--drafter", str(uncalibrated)]
    assert main(["calibrate", *pair, "--output-dir", str(uncalibrated), *SMALL]) == 0
    after = {path.name: path.read_bytes() for path in uncalibrated.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"config.json"} and set(after) == set(before)
    old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
    assert {name for name in new if new[name] != old.get(name)} == {"calibration"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts: 0 given"),
        (["--prompts", "missing.jsonl"], "--prompts: there is no file 'missing.jsonl'"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path, capsys, options, message):
    argv = ["calibrate", "--target", "tiny", "--drafter", "tiny-standalone", "--output-dir", str(tmp_path), *options]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_prompts_that_leave_none_to_compare_on_are_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\nimport sys\n")
    pair = ["--target", "tiny", "--drafter", "tiny-standalone", "--output-dir", str(tmp_path / "out")]
    assert main(["calibrate", *pair, "--prompts", str(prompts), "--fit-prompts", "2"]) == 2
    assert "--fit-prompts: 2 of the 2 prompts" in capsys.readouterr().err
