"""Where attention over a sequence in parts stops scaling: ``python -m benchmarks.context_scaling``.

Modelled, not measured on several devices. A causal call over a whole sequence of S rows takes
2 H D S^2 operations (two products, for half of the S^2 scores) at the rate of one device; n devices
share them evenly in the zigzag layout. Keys and values, 2 Hkv D S elements of 2
bytes, pass through each link (n - 1) / n times. A gather waits for them; a ring that hides them
behind the products would take whichever takes longer.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """Devices and what links them.

    Args:
        name: what they are.
        rate: operations a second of causal attention on one device.
        link: bytes a second of a device's link, in one direction.
    """

    name: str
    rate: float
    link: float


SETTINGS = (
    Setting("H200 over NVLink", 500e12, 450e9),  # rate measured: results/2026-12-01-h200-wgmma.txt
    Setting("H200 over 400 Gbit/s", 500e12, 50e9),
    Setting("M3 Ultra over Thunderbolt 5", 20e12, 6e9),  # both assumed
    Setting("M3 Ultra over 10 Gbit/s", 20e12, 1.1e9),
)
DEVICES = (2, 8, 32, 128, 1024)
HEADS, KV_HEADS, WIDTH = 32, 8, 128


def seconds(setting: Setting, tokens: int, devices: int) -> tuple[float, float]:
    """Of one layer's forward pass: computing on each device, and passing keys and values."""
    computing = 2 * HEADS * WIDTH * tokens**2 / setting.rate / devices
    moved = 2 * KV_HEADS * WIDTH * tokens * 2 * (devices - 1) / devices
    return computing, moved / setting.link


def main() -> None:
    heads = f"{HEADS}/{KV_HEADS} heads of {WIDTH}, 16 bits, causal"
    print(f"Speed-up of one layer's forward pass ({heads}); modelled.")
    print(f"{'':28} {'tokens':>9}  " + "".join(f"{f'n = {n}':>16}" for n in DEVICES))
    for setting in SETTINGS:
        for tokens in (1 << 17, 1 << 20):
            alone, _ = seconds(setting, tokens, 1)
            cells = []
            for devices in DEVICES:
                computing, moving = seconds(setting, tokens, devices)
                gather, ring = computing + moving, max(computing, moving)
                cells.append(f"{alone / gather:>7.1f} /{alone / ring:>7.1f}")
            print(f"{setting.name:28} {tokens:>9,}  " + "".join(cells))
    print("gather / ring that hides communication")


if __name__ == "__main__":
    main()
