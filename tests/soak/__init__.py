"""Campaigns of faults: kills, failing writes, damage and malformed input lose nothing and are reported.

`python -m soak --count COUNT --seed SEED [CAMPAIGN…]`, with this folder's parent and the project's on PYTHONPATH, or
`make soak`. Every trial is checked; the first fault that is handled otherwise ends the program with its traceback. A
campaign's counts are printed as JSON. tests/test_soak.py runs a few trials of each.
"""
