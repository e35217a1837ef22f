"""What NVIDIA's checkers run: every field of a config, and every kind of append."""

from __future__ import annotations

import pytest

from benchmarks.sanitize_cuda import APPENDS, CONFIGS, kernels, main
from metalgen.devices import Runner
from metalgen.devices.reference import ReferenceDevice
from metalgen.families import Limits, Schedule, check_schedule
from metalgen.families.append import append_schedule, inputs, operands, outputs
from metalgen.problem.config import AttentionConfig, field_names
from metalgen.source.render import render


def test_every_field_of_a_config_is_used() -> None:
    used = [n for n in field_names() if len({getattr(config, n) for config in CONFIGS}) > 1]
    assert used == field_names()
    assert {config.kv_bits for config in CONFIGS} == {None, 4, 8}
    assert {config.rope for config in CONFIGS} == {None, "half", "pairs"}
    assert {config.dtype for config in CONFIGS} == {"float32", "float16", "bfloat16"}


def test_every_input_and_output_of_an_append_is_used() -> None:
    assert all(operands(config) for config in APPENDS)
    parts = {name.split("_")[1] for config in APPENDS for name in outputs(config) if "_" in name}
    assert parts == {"rows", "words", "scales", "biases"}
    assert {name for config in APPENDS for name in inputs(config)} == {
        *("k", "v", "cu_seqlens", "offset", "limit", "table", "rope_freqs", "rope_offset"),
        *("rope_cos", "rope_sin"),
    }


def test_a_wrong_kernel_is_said_to_be_wrong_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(ReferenceDevice):
        """Its results are doubled."""

        def build(self, config: AttentionConfig, schedule: Schedule | None = None) -> Runner:
            run = super().build(config)
            return lambda *call: (2 * run(*call)[0], run(*call)[1])

    from benchmarks import sanitize_cuda

    one = AttentionConfig(64)
    monkeypatch.setattr(sanitize_cuda, "CONFIGS", (one,))
    monkeypatch.setattr(sanitize_cuda, "APPENDS", ())
    monkeypatch.setattr(sanitize_cuda, "BACKWARD", ())
    for device, code in ((ReferenceDevice(), 0), (Wrong(), 1)):
        monkeypatch.setattr(sanitize_cuda, "get_device", lambda name, own=device: own)
        assert main(["--device", "reference"]) == code
        *lines, last = capsys.readouterr().out.splitlines()
        assert len(lines) == 4  # two schedules of both families
        assert all(line.endswith("ok") != bool(code) for line in lines)
        assert last == f"4 kernels, {4 * code} wrong"


def test_parts_together_are_all_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import sanitize_cuda

    monkeypatch.setattr(sanitize_cuda, "CONFIGS", (AttentionConfig(64),))
    monkeypatch.setattr(sanitize_cuda, "APPENDS", ())
    monkeypatch.setattr(sanitize_cuda, "BACKWARD", ())
    found = []
    for part in ("1/3", "2/3", "3/3"):
        assert main(["--device", "reference", "--part", part]) == 0
        found.append(capsys.readouterr().out.splitlines()[:-1])
    assert [len(lines) for lines in found] == [2, 1, 1]
    assert len({line for lines in found for line in lines}) == 4
    for wrong in ("0/3", "4/3", "1", "1/0", "a/b"):
        with pytest.raises(SystemExit):
            main(["--part", wrong])
        assert f"expected N/M with 1 <= N <= M, got '{wrong}'" in capsys.readouterr().err


def test_all_of_it_is_rendered_for_an_h200_and_is_compared_with_the_reference() -> None:
    found = []

    class Rendering(ReferenceDevice):
        """Renders CUDA kernels, and computes by plain MLX."""

        language = "cuda"
        limits = Limits(232448, 1024, "cuda")

        def build(self, config: AttentionConfig, schedule: Schedule | None = None) -> Runner:
            assert schedule is not None
            check_schedule(config, schedule, self.limits)
            found.append(render(config, schedule).name)
            return super().build(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.sanitize_cuda.APPENDS", ())
        patch.setattr("benchmarks.sanitize_cuda.BACKWARD", ())
        faults = [fault_of() for _, fault_of in kernels(Rendering())]
    assert len(set(found)) == len(found) == len(faults) > 80
    assert not any(faults)
    for config in APPENDS:
        assert render(config, append_schedule(language="cuda")).source
