"""The command line from a folder of photos, some of them bad, to a finished run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from distssl import monitor
from tests import planted, runs

ROOT = Path(__file__).parent.parent


def test_pretraining_on_a_folder_with_bad_images_finishes_and_names_them(tmp_path: Path) -> None:
    photos = runs.photos(tmp_path / "photos", num=60, classes=1) / "class0"  # flat, so without labels
    bad = planted.bad(3000)
    for kind, (data, _) in bad.items():
        (photos / f"{kind}.jpg").write_bytes(data)
    options = [option for option in runs.settings() if not option.startswith("machine.")]
    places = [f"data.source={photos}", f"machine.cache={tmp_path / 'cache'}", f"machine.storage={tmp_path / 'runs'}"]
    more = ["name=bad", "train.epochs=2", "eval.source=null", "data.max_bad_fraction=0.1"]
    command = [sys.executable, "launch.py", "pretrain", "--workers", "0", *options, *places, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    run_dir = tmp_path / "runs" / "bad"
    assert [row["step"] for row in monitor.read_jsonl(run_dir / monitor.METRICS) if "loss" in row] == list(range(1, 7))
    # Headers show most of them to be bad while packing; those that only decoding finds are met in training.
    entries = monitor.read_jsonl(run_dir / monitor.QUARANTINE)
    assert {entry["key"].rpartition("/")[2] for entry in entries} == {"cut_jpeg", "cut_png"}
    assert all(entry["reason"].startswith("cannot be decoded") for entry in entries)
    for kind in bad:
        assert kind in done.stderr
