"""What tests compare of training runs."""

import jax
import numpy as np

from memo_jax.log import read_metrics
from memo_jax.training.checkpoint import load_raw
from memo_jax.training.monitor import TIMES


def arrays(workdir, step=None):
    """{path: array} of everything in a checkpoint's state."""
    state = load_raw(workdir, step)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def assert_same_state(one, other, step=None):
    one, other = arrays(one, step), arrays(other, step)
    assert one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name, strict=True)


def rows_without_times(workdir):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(workdir)]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []
