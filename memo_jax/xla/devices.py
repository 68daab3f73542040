"""The device that a command computes on, by the name that a user gives it."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")
DEVICE_NAME = re.compile(rf"({'|'.join(PLATFORMS)})(?::(\d{{1,4}}))?")


def check_device_name(name: str) -> str:
    """Returns the name of a device, such as "cpu", "gpu" or "cuda:1"; raises ValueError for any other text."""
    if not DEVICE_NAME.fullmatch(name):
        raise ValueError(
            f"device {name!r}: expected {', '.join(PLATFORMS)}, perhaps with a number from 0, as in cuda:1"
        )
    return name


@contextlib.contextmanager
def on_device(name: str) -> Iterator[None]:
    """Makes JAX compute on this device alone in a block; without a number, on the first of its kind.

    Choosing the CPU before JAX is imported neither imports JAX nor touches an accelerator.

    Args:
      name: see `check_device_name`.

    Raises:
      ValueError: no such device; the message names those that there are.
    """
    platform, number = DEVICE_NAME.fullmatch(check_device_name(name)).groups()
    if platform == "cpu" and not int(number or 0) and "jax" not in sys.modules:
        before = os.environ.get("JAX_PLATFORMS")
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            yield
        finally:
            if before is None:
                del os.environ["JAX_PLATFORMS"]
            else:
                os.environ["JAX_PLATFORMS"] = before
        return
    import jax

    devices = _devices(platform)
    if int(number or 0) >= len(devices):
        raise ValueError(f"there is no device {name} here; choose one of {', '.join(device_names())}")
    with jax.default_device(devices[int(number or 0)]):
        yield


def device_names() -> list[str]:
    """Returns the names of the devices of this process: "cuda:0", "cuda:1", "cpu:0"."""
    return [device_name(device) for platform in ("tpu", "gpu", "cpu") for device in _devices(platform)]


def device_name(device: "jax.Device | None" = None) -> str:
    """Returns the name of a device, by default of the one that JAX computes on."""
    device = device or chosen_devices()[0]
    maker = re.match(r"(cuda|rocm)\b", str(device))
    return f"{maker[1] if maker else device.platform}:{device.id}"


def chosen_devices() -> list["jax.Device"]:
    """Returns the device of `on_device`, or all that JAX has."""
    import jax

    chosen = jax.config.jax_default_device
    return [chosen] if isinstance(chosen, jax.Device) else jax.devices()


def _devices(platform: str) -> list:
    """The devices of a platform, [] where there are none."""
    import jax

    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # JAX has no device of this platform
        return []
