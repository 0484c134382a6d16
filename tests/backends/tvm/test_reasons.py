"""Errors of TVM reach people in one line."""

from __future__ import annotations

from burnish.backends.tvm.reasons import last_line


def test_of_a_stack_of_frames_the_line_behind_it_is_said() -> None:
    error = RuntimeError("Traceback:\n  0: tvm::relax::f()\n\nCheck failed: a == b \n")
    assert last_line(error) == "Check failed: a == b"


def test_an_error_without_text_is_called_by_its_type_and_a_long_one_is_cut() -> None:
    assert last_line(KeyError()) == "KeyError"
    assert last_line(RuntimeError("x" * 900), 200) == "x" * 200
