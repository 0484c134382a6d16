"""The page of `check run`: what differs, where, and both graphs, with and without the models."""

from pathlib import Path

from burnish.tools.check.check import check
from burnish.tools.check.take import Request
from burnish.tools.page.check_page import check_page
from burnish.tools.page.parts import Chart, Entry, Graphs, Page, State


def graph(page: Page) -> Graphs:
    return next(part for section in page.sections for part in section.parts if isinstance(part, Graphs))


def lines(page: Page) -> list[tuple[str, str | None, str | None]]:
    return [
        (piece.title, line.old, line.new)
        for piece in graph(page).pieces
        for line in piece.lines
        if line.state is not State.SAME
    ]


def test_it_tells_every_difference_and_marks_the_lines_that_changed(changed):
    report, old, new = changed
    page = check_page(report, old, new)
    assert page.mark == "regressed" and "regressed" in page.summary
    told = [part for section in page.sections for part in section.parts if isinstance(part, Entry)]
    assert len(told) == len(report.differences)
    assert [one.state for one in told][: len(report.regressions)] == [State.BAD] * len(report.regressions)
    states = {piece.title: piece.state for piece in graph(page).pieces}
    assert states["before block 0"] is State.SAME and State.WEIGHTS in states.values()
    seen = [(was, now) for _, was, now in lines(page)]
    assert any("Erf(" in (was or "") and now is None for was, now in seen)
    assert any("Tanh(" in (now or "") and was is None for was, now in seen)
    assert any(was and now and now.startswith(was) and "epsilon=0.001" in now for was, now in seen)


def test_without_the_models_the_lock_has_the_lines_and_the_names_of_layers(changed):
    report, old, new = changed
    alone, beside = check_page(report), check_page(report, old, new)
    assert lines(alone) == lines(beside)
    named = {name for piece in graph(alone).pieces for line in piece.lines for name in line.old_names}
    assert named < {name for piece in graph(beside).pieces for line in piece.lines for name in line.old_names}
    assert any("MatMul" in name or "Transpose" in name for name in named)


def test_every_picture_is_a_table_too(changed):
    page = check_page(changed[0])
    charts = {part.title: part for section in page.sections for part in section.parts if isinstance(part, Chart)}
    assert len(charts["How far the weights of each layer moved"].table.rows) == 1
    outputs = charts["How far each output moved"]
    assert len(outputs.table.rows) == sum(len(one.outputs) for one in changed[0].new.values)


def test_a_model_that_is_what_it_was_passes_and_nothing_moved(changed):
    report, old, _ = changed
    same = check(old, report.old, Request(), model_name="same.onnx")
    page = check_page(same)
    assert page.state is State.GOOD and page.mark == "passed"
    assert {piece.state for piece in graph(page).pieces} == {State.SAME}
    assert not page.has_charts


def test_a_path_does_not_have_to_exist(changed):
    assert "a.lock.yaml" in " ".join(check_page(changed[0]).foot)
    assert not Path("a.lock.yaml").exists()
