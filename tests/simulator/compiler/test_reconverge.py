"""Where meeting points are put, and where none is needed."""

from __future__ import annotations

from metalgen.simulator.compiler.reconverge import inline_waiting, post_dominators, reconverge

WAIT = "  call preserve_nonecc void @mg_ballot(i32 1, i32 0)"


def test_post_dominators_of_a_diamond_and_a_loop() -> None:
    assert post_dominators([[1, 2], [3], [3], []]) == [3, 3, 3, 4]
    # 0 -> 1 (header) -> 2 (body) -> 1, 1 -> 3
    assert post_dominators([[1], [2, 3], [1], []]) == [1, 3, 1, 4]


def function(*lines: str) -> str:
    return "\n".join(["define void @f(i1 %c) #0 {", *lines, "}", ""])


def test_a_branch_around_a_wait_has_a_meeting_point_at_its_end() -> None:
    code = function(
        "  br i1 %c, label %a, label %b", "a:", WAIT, "  br label %b",
        "b:", "  %p = phi i32 [ 0, %0 ], [ 1, %a ]", "  ret void",
    )  # fmt: skip
    lines = reconverge(code).split("\n")
    at = lines.index("  call preserve_nonecc void @mg_converge(i32 0)")
    assert lines[at - 1].startswith("  %p = phi") and lines[at + 1] == "  ret void"


def test_a_branch_without_a_wait_has_none() -> None:
    code = function(
        "  br i1 %c, label %a, label %b", "a:", "  br label %b", "b:", WAIT, "  ret void"
    )
    assert "@mg_converge(i32 0)" not in reconverge(code)


def test_the_inner_meeting_point_comes_first() -> None:
    """A loop in a loop: lanes that leave the inner one meet before they turn again."""
    code = function(
        "  br label %outer", "outer:", "  br label %inner",
        "inner:", WAIT, "  br i1 %c, label %inner, label %turn",
        "turn:", "  br i1 %c, label %outer, label %end", "end:", "  ret void",
    )  # fmt: skip
    lines = reconverge(code).split("\n")
    inner = lines.index("  call preserve_nonecc void @mg_converge(i32 0)")
    outer = lines.index("  call preserve_nonecc void @mg_converge(i32 1)")
    assert lines[inner - 1] == "turn:" and lines[outer - 1] == "end:"


def test_functions_that_wait_are_inlined() -> None:
    code = (
        "define void @waits() #1 {\n" + WAIT + "\n  ret void\n}\n"
        "define void @calls(ptr %p) local_unnamed_addr #2 {\n  call void @waits()\n  ret void\n}\n"
        "define void @plain() #3 {\n  ret void\n}\n"
        "define void @mg_kernel(ptr %t) #4 {\n  call void @calls(ptr %t)\n  ret void\n}\n"
    )
    lines = [line for line in inline_waiting(code).split("\n") if line.startswith("define")]
    assert ["alwaysinline" in line for line in lines] == [True, True, False, False]
