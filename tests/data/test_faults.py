"""Write errors, kills and damaged bytes around `prepare`: a few trials of the campaigns of tests/soak_prepare.py."""

import json
import subprocess
import sys

import tiny


def test_faults_lose_nothing_and_damage_is_noticed_or_harmless(tmp_path):
    program = tiny.ROOT / "tests" / "soak_prepare.py"
    run = subprocess.run([sys.executable, program, "12", "0"], env=tiny.environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert report["write_errors"]["told"] >= 10 and report["kills"]["killed"] >= 10
    assert report["dataset_damage"]["noticed when read"] >= 50 and report["archive_damage"]["noticed"] >= 130
