"""The HTML page about a training run: `page` assembles it from `template` and `learning_curves`."""
