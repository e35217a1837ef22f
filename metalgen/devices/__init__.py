"""What executes kernels: an Apple or NVIDIA GPU, the simulator, or plain MLX."""

from __future__ import annotations

import mlx.core as mx

from metalgen import switches
from metalgen.devices.base import Device, Runner
from metalgen.devices.cuda import CudaDevice
from metalgen.devices.metal import MetalDevice
from metalgen.devices.reference import ReferenceDevice
from metalgen.devices.simulator import SimulatorDevice
from metalgen.errors import ArgumentError

__all__ = ["Device", "Runner", "all_devices", "default_device", "get_device"]

_DEVICES: dict[str, Device] = {
    device.name: device
    for device in (MetalDevice(), CudaDevice(), SimulatorDevice(), ReferenceDevice())
}


def all_devices() -> tuple[Device, ...]:
    """Every device that metalgen knows, available here or not."""
    return tuple(_DEVICES.values())


def default_device() -> Device:
    """What computes calls that name no device.

    The device of ``METALGEN_DEVICE``; where it is unset this machine's GPU, if MLX computes on it,
    and else plain MLX. ``METALGEN_REFERENCE=1`` forces plain MLX.

    Raises:
        ArgumentError: a variable with a value that means nothing.
        DeviceError: the device that it names cannot be used here, with the reason.
    """
    if switches.forced_reference():
        return _DEVICES["reference"]
    if (name := switches.asked_device()) is not None:
        if name not in _DEVICES:
            raise ArgumentError("METALGEN_DEVICE", f"one of {', '.join(_DEVICES)}", name)
        return _DEVICES[name].require()
    if mx.default_device().type == mx.DeviceType.gpu:
        for device in _DEVICES.values():
            if device.is_gpu and device.unavailable() is None:
                return device
    return _DEVICES["reference"]


def get_device(name: str | None = None) -> Device:
    """The device of that name, or the default one.

    Raises:
        ArgumentError: an unknown name.
        DeviceError: a device that cannot be used here, with the reason.
    """
    if name is None:
        return default_device()
    if not isinstance(name, str) or name not in _DEVICES:
        raise ArgumentError("device", f"one of {', '.join(_DEVICES)}, or None", name)
    return _DEVICES[name].require()
