"""onnxruntime, imported with its telemetry off."""

import os
from types import ModuleType


def import_onnxruntime() -> ModuleType:
    """Returns onnxruntime, which by itself would report usage to its makers over the network (since 1.32 on Linux)."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reads this when it is imported
    import onnxruntime

    return onnxruntime
