"""The HTML page about a training run.

Read `page` first, which assembles it, then `learning_curves` and `pictures`, which draw; `template` has the frame, the
style sheet and the script.
"""
