"""Chip facts: names, figures with their origins, limits, and finding this machine's chip."""

from __future__ import annotations

import pickle

import pytest

from metalgen.chips import Chip, IncompleteChip, UnknownChip, all_chips, facts, get_chip, neighbours
from metalgen.chips import detect as detect_this_machine
from metalgen.chips.detection import identify
from metalgen.chips.facts import NVIDIA_CHIPS
from metalgen.devices.cuda import CudaDevice
from metalgen.families import Limits

# Core counts as Apple sells them: the full chip first.
SOLD = {
    "M1": (8, 7),
    "M1Pro": (16, 14),
    "M1Max": (32, 24),
    "M1Ultra": (64, 48),
    "M2": (10, 8),
    "M2Pro": (19, 16),
    "M2Max": (38, 30),
    "M2Ultra": (76, 60),
    "M3": (10, 8),
    "M3Pro": (18, 14),
    "M3Max": (40, 30),
    "M3Ultra": (80, 60),
    "M4": (10, 8),
    "M4Pro": (20, 16),
    "M4Max": (40, 32),
    "M5": (10, 8),
    "M5Pro": (20, 16),
    "M5Max": (40, 32),
    "M5Ultra": (80, 64),
}

IOREG_M3_MAX = """\
+-o AGXAcceleratorG15X  <class AGXAcceleratorG15X, id 0x1000004a9, registered, matched, active>
    {
      "IOClass" = "AGXAcceleratorG15X"
      "MetalPluginName" = "AGXMetalG15X_M1"
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Device Utilization %"=42}
      "model" = "Apple M3 Max"
      "gpu-core-count" = 30
    }
"""


def test_every_core_count_that_is_sold_is_a_chip_of_its_own() -> None:
    names = [c.name for c in all_chips() if c.kind == "apple"]
    expected = []
    for name, (full, binned) in SOLD.items():
        expected += [name, f"{name}-{binned}"]
        assert get_chip(name).cores == full
        assert get_chip(f"{name}-{binned}").cores == binned
    assert names == expected


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("M3Max", "M3Max"),
        ("m3max", "M3Max"),
        ("M3 Max", "M3Max"),
        ("Apple M3 Max", "M3Max"),
        ("M3Max-40", "M3Max"),
        ("M3Max-30", "M3Max-30"),
        ("M3 Max 30-core", "M3Max-30"),
        (" m4 pro-16 ", "M4Pro-16"),
        ("M1-7", "M1-7"),
        ("h200", "H200"),
        ("NVIDIA H100", "H100"),
    ],
)
def test_a_chip_is_found_however_its_name_is_spelled(spelling: str, name: str) -> None:
    assert get_chip(spelling).name == name


def test_an_unknown_chip_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownChip) as raised:
        get_chip("M3Mx")
    assert raised.value.nearest[0] == "M3Max"
    assert "M3Max" in str(raised.value)
    assert "'M3Mx'" in str(raised.value)
    with pytest.raises(UnknownChip) as raised:
        get_chip("M3Max-33")
    assert raised.value.nearest[:2] == ("M3Max", "M3Max-30")
    with pytest.raises(UnknownChip) as raised:
        get_chip("banana")
    assert raised.value.nearest == ()


@pytest.mark.parametrize("name", [None, 3, "", "M", "M3Max30"])
def test_what_is_no_name_is_an_unknown_chip_too(name: object) -> None:
    with pytest.raises(UnknownChip):
        get_chip(name)


def test_errors_of_chips_survive_a_pickle() -> None:
    unknown = pickle.loads(pickle.dumps(UnknownChip("M9", ("M5",))))
    assert (unknown.got, unknown.nearest) == ("M9", ("M5",))
    incomplete = pickle.loads(pickle.dumps(IncompleteChip("M9", ("clock_ghz",))))
    assert incomplete.missing == ("clock_ghz",)


@pytest.mark.parametrize(
    ("name", "tflops"),
    # metal-benchmarks' table of peaks for M1 and M2; 28 for the M3 Ultra by specification.
    [
        ("M1", 2.62),
        ("M1Pro", 5.31),
        ("M1Max", 10.62),
        ("M1Ultra", 21.2),
        ("M2", 3.58),
        ("M2Pro", 6.80),
        ("M2Max", 13.6),
        ("M3Ultra", 28),
    ],
)
def test_peaks_follow_from_cores_and_clock(name: str, tflops: float) -> None:
    assert get_chip(name).fp32_tflops == pytest.approx(tflops, rel=0.01)
    assert get_chip(name).fp16_tflops == get_chip(name).fp32_tflops


def test_a_binned_chip_has_its_own_bandwidth_where_the_vendor_says_so() -> None:
    bandwidths = {
        name: get_chip(name).dram_gbs
        for name in ("M3Max", "M3Max-30", "M4Max", "M4Max-32", "M5Max", "M5Max-32", "M1Max-24")
    }
    assert bandwidths == {
        "M3Max": 400,
        "M3Max-30": 300,
        "M4Max": 546,
        "M4Max-32": 410,
        "M5Max": 614,
        "M5Max-32": 460,
        "M1Max-24": 400,
    }


def test_generations_differ_in_their_traits() -> None:
    def traits(name: str) -> tuple[bool, bool, bool]:
        chip = get_chip(name)
        return chip.dynamic_registers, chip.direct_reads, chip.neural_accelerators

    assert traits("M1Max") == traits("M2") == (False, False, False)
    assert traits("M3Max") == traits("M4Pro-16") == (True, True, False)
    assert traits("M5Max-32") == (True, True, True)


def test_every_figure_has_an_origin() -> None:
    identity = {"name", "kind", "generation", "tier", "cores", "full_cores", "origins"}
    for chip in all_chips():
        for field in Chip.__dataclass_fields__:
            value = getattr(chip, field)
            if field in identity or value is None:
                continue
            assert field in chip.origins, f"{chip.name}.{field} has no origin"
            assert chip.origins[field].source in facts.SOURCES.values()


def test_an_estimated_figure_says_so_and_a_vendors_does_not() -> None:
    chip = get_chip("M3Max")
    assert chip.origins["l2_bytes"].estimated
    assert not chip.origins["dram_gbs"].estimated
    assert "Apple" in chip.origins["dram_gbs"].source


def test_limits_are_those_of_the_api() -> None:
    for chip in all_chips():
        if chip.kind == "apple":
            assert chip.limits == Limits(threadgroup_bytes=32768, threads=1024)
    assert get_chip("H200").limits == Limits(232448, 1024, "cuda", ("wgmma",))
    assert get_chip("A100").limits == Limits(166912, 1024, "cuda")


def test_an_nvidia_chip_allows_what_its_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx.core.cuda.is_available", lambda: True)
    for name, (_, capability, _, _) in NVIDIA_CHIPS.items():
        major, minor = capability.split(".")
        info = {"compute_capability_major": major, "compute_capability_minor": minor}
        monkeypatch.setattr("mlx.core.device_info", lambda device, info=info: info)
        device = CudaDevice()
        assert device.unavailable() is None
        assert get_chip(name).limits == device.limits


def test_peaks_of_nvidia_chips_are_those_of_their_data_sheets() -> None:
    assert get_chip("A100").fp32_tflops == pytest.approx(19.5, rel=0.01)
    assert get_chip("H100").fp32_tflops == pytest.approx(67, rel=0.01)
    assert get_chip("H100-114").fp32_tflops == pytest.approx(51, rel=0.01)


def test_a_chip_without_the_figures_that_are_needed_names_all_that_are_missing() -> None:
    chip = Chip("M9", "apple", "M9", "", 10, 10, clock_ghz=2.0)
    with pytest.raises(IncompleteChip) as raised:
        chip.require("clock_ghz", "dram_gbs", "l2_bytes")
    assert raised.value.missing == ("dram_gbs", "l2_bytes")
    with pytest.raises(IncompleteChip, match="threadgroup_bytes, threads"):
        _ = chip.limits


def test_neighbours_are_the_same_chip_first_and_then_its_generation() -> None:
    assert neighbours(get_chip("M3Max-30")) == (
        "M3Max",
        "M3Pro",
        "M3Pro-14",
        "M3",
        "M3-8",
        "M3Ultra-60",
        "M3Ultra",
    )
    assert neighbours(get_chip("H200")) == ("H100", "H100-114")
    assert neighbours(get_chip("A100")) == ()
    assert neighbours(get_chip("L4")) == ("RTX4090", "L40S", "L40")


def test_a_mac_is_known_by_what_sysctl_and_ioreg_print() -> None:
    found = identify("Apple M3 Max\n", IOREG_M3_MAX)
    assert found is not None
    assert found.name == "M3Max-30"


@pytest.mark.parametrize(
    ("brand", "accelerator", "name"),
    [
        ("Apple M4\n", '      "gpu-core-count" = 10\n', "M4"),
        ("Apple M4\n", '      "gpu-core-count" = 8\n', "M4-8"),
        ("Apple M1 Ultra\n", '  | |   "gpu-core-count" = 48', "M1Ultra-48"),
        ("Apple M2 Pro\n", "", "M2Pro"),
        ("Apple M2 Pro\n", '"gpu-core-count" = 17', "M2Pro-16"),
        ("Apple M1 (Virtual)\n", "", "M1"),
    ],
)
def test_the_core_count_chooses_among_the_sizes(brand: str, accelerator: str, name: str) -> None:
    found = identify(brand, accelerator)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("brand", ["", "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", "Apple M99"])
def test_other_machines_have_no_chip_that_is_known(brand: str) -> None:
    assert identify(brand, '"gpu-core-count" = 10') is None


def test_detection_is_silent_where_neither_macos_nor_cuda_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("mlx.core.cuda.is_available", lambda: False)
    detect_this_machine.cache_clear()
    assert detect_this_machine() is None
    detect_this_machine.cache_clear()


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-114"),
        ("NVIDIA H100 NVL", "H100"),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A6000", "RTXA6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("", None),
    ],
)
def test_an_nvidia_machine_is_known_by_what_mlx_says(
    product: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"device_name": product, "architecture": "sm_90", "compute_capability_major": 9}
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("mlx.core.cuda.is_available", lambda: True)
    monkeypatch.setattr("mlx.core.device_info", lambda device: info)
    detect_this_machine.cache_clear()
    found = detect_this_machine()
    detect_this_machine.cache_clear()
    assert (found and found.name) == name


def test_detection_asks_the_two_programs_of_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"sysctl": "Apple M3 Max\n", "ioreg": IOREG_M3_MAX}
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(
        "metalgen.chips.detection._output", lambda command: said[command[0].rpartition("/")[2]]
    )
    detect_this_machine.cache_clear()
    try:
        found = detect_this_machine()
        assert found is not None
        assert found.name == "M3Max-30"
    finally:
        detect_this_machine.cache_clear()


def test_a_program_that_is_not_there_says_nothing() -> None:
    from metalgen.chips.detection import _output

    assert _output(("/nonexistent/sysctl",)) == ""
