"""What tests compare between training runs."""

import jax
import numpy as np

from memo_jax.log import read_metrics
from memo_jax.training.checkpoint import load_state
from memo_jax.training.monitor import TIMES

# A process that kills itself: `KILLED POINT STEP ARGUMENT…`, in a row of metrics or in a save.
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from memo_jax import cli, log
from memo_jax.training import checkpoint

point, step = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
write, save = log.MetricsLog.write, checkpoint.Checkpointer.save

def write_or_die(self, number, values):
    if (point, number) == ("row", step):
        self._file.write('{"step": %d, "lo' % step)
        self._file.flush()
        die()
    write(self, number, values)

def save_or_die(self, number, *rest):
    def watch():
        while not list(Path(self.folder).glob(f"{number}.orbax-checkpoint-tmp*")):
            time.sleep(1e-4)
        die()
    if (point, number) == ("save", step):
        threading.Thread(target=watch, daemon=True).start()
    save(self, number, *rest)
    if (point, number) == ("save", step):
        self.wait()
        die()

log.MetricsLog.write, checkpoint.Checkpointer.save = write_or_die, save_or_die
sys.exit(cli.main())
"""


def arrays(workdir, step=None):
    """{path: array} of everything in a checkpoint's state."""
    state = load_state(workdir, step)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def assert_same_state(one, other, step=None, least=100):
    one, other = arrays(one, step), arrays(other, step)
    assert one.keys() == other.keys() and len(one) > least
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name, strict=True)


def rows_without_times(workdir):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(workdir)]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []
