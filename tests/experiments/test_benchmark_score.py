"""The scoring benchmark runs in miniature and agrees with scikit-learn."""

import importlib.util
import json

import tiny


def test_it_prints_its_numbers_and_both_methods_agree(capsys):
    spec = importlib.util.spec_from_file_location("score", tiny.ROOT / "experiments" / "benchmarks" / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = "--trials 3000 --recordings 600 --speakers 30 --dimension 16 --replicates 20 --json".split()
    returned = module.main(arguments)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(returned))
    assert printed["trials"] == 3000 and printed["difference"] < 1e-6
    assert printed["seconds"] > 0 and printed["ratio"] > 0
    assert printed["eer_interval"][0] < printed["eer"] < printed["eer_interval"][1]
