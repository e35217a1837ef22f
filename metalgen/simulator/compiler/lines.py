"""Lines of the source by address, from a shared object's line table."""

from __future__ import annotations

import bisect
from pathlib import Path


class LineTable:
    """The line table of the shared object at `path`, read on first use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[tuple[int, str, int]] | None = None

    def find(self, address: int) -> tuple[str, int] | None:
        """File and line of the instruction before `address` (a return address), or None."""
        if self._rows is None:
            self._rows = _read(self._path)
        at = bisect.bisect_right(self._rows, (address - 1, "\uffff", 0)) - 1
        if at < 0 or self._rows[at][2] == 0:
            return None
        return self._rows[at][1], self._rows[at][2]


def _read(path: Path) -> list[tuple[int, str, int]]:
    from elftools.elf.elffile import ELFFile

    rows: list[tuple[int, str, int]] = []
    with path.open("rb") as stream:
        if stream.read(4) != b"\x7fELF":  # macOS: no lines
            return rows
        stream.seek(0)
        elf = ELFFile(stream)
        if not elf.has_dwarf_info():
            return rows
        dwarf = elf.get_dwarf_info()
        for unit in dwarf.iter_CUs():
            program = dwarf.line_program_for_CU(unit)
            if program is None:
                continue
            files = [f.name.decode() for f in program["file_entry"]]
            base = 0 if program["version"] >= 5 else 1
            last = 0
            for row in program.get_entries():
                state = row.state
                if state is None:
                    continue
                if state.end_sequence:
                    rows.append((state.address, "", 0))
                    continue
                index = state.file - base
                name = files[index] if 0 <= index < len(files) else ""
                # Line 0 marks code the compiler made up; it belongs to what stands before it.
                last = state.line or last
                rows.append((state.address, name, last))
    rows.sort()
    return rows
