"""The pytest plugin as a project sees it where pip installed burnish: locks beside the tests, and what runs say."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path

import onnx
import pytest
from examples import blocks

import burnish
from burnish.tools.graph_regression import safe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import msgspec  # noqa: F401  runs inside this process share what is loaded before them
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch
    import yaml  # noqa: F401

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[3]
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "scipy", "torch", "yaml", "msgspec", "rich", "click")
MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 3] x) => (float[batch, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
  [linear] h = MatMul (x, w)  [act] y = ACT (h) }"""
CHECK = """
def test_encoder(graph_regression):
    graph_regression.check("model.onnx")
"""
MODULES = """
import pytest
import torch

torch.set_num_threads(1)

class Net(torch.nn.Module):
    def __init__(self, act=torch.nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.act = torch.nn.Linear(3, 2), act()

    def forward(self, x, scale=None):
        y = self.act(self.linear(x))
        return y if scale is None else y * scale

X = torch.ones(2, 3)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip adds to a folder of packages: metadata with the entry points."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "burnish-0.1.0.dist-info"
    info.mkdir()
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: burnish\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    return folder


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, site: Path) -> pytest.Pytester:
    """A project in the current folder, with `model.onnx`, where burnish is installed."""
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT / '.src'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(site))
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = error\n")
    save("Relu")
    return pytester


def save(activation: str, path: str = "model.onnx") -> None:
    onnx.save(onnx.parser.parse_model(MODEL.replace("ACT", activation)), path)


def locks() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*.lock.yaml"))


def test_loads_nothing_heavy_before_a_test_checks_a_model(project: pytest.Pytester) -> None:
    project.makeconftest(f"""
        import sys
        def pytest_unconfigure(config):
            print("loaded:", "burnish.tools.pytest_plugin" in sys.modules, [n for n in {HEAVY!r} if n in sys.modules])
    """)
    project.makepyfile("def test_trivial(): pass")
    for arguments in (["--co"], []):
        result = project.runpytest_subprocess(*arguments)
        assert result.ret == 0
        result.stdout.fnmatch_lines(["loaded: True []"])
        result.stdout.no_fnmatch_line("*graph locks*")


def test_without_a_lock_a_test_fails_and_writes_nothing(project: pytest.Pytester) -> None:
    file = project.makepyfile(CHECK)
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    command = f"pytest {file.name}::test_encoder --graph-update"
    result.stdout.fnmatch_lines(
        [f"there is no lock `{file.stem}/test_encoder.lock.yaml`", f"hint: `{command}` writes it*"]
    )
    assert not locks() and not Path(file.stem).exists()


def test_a_lock_is_written_kept_and_renewed_on_request_only(project: pytest.Pytester) -> None:
    file = project.makepyfile(CHECK)
    lock = f"{file.stem}/test_encoder.lock.yaml"
    written = project.runpytest_inprocess("--graph-update")
    written.assert_outcomes(passed=1)
    written.stdout.fnmatch_lines(["*graph locks*", f"{lock}: written"])
    before = Path(lock).read_bytes()

    for arguments in ([], ["--graph-update"]):
        kept = project.runpytest_inprocess(*arguments)
        kept.assert_outcomes(passed=1)
        kept.stdout.no_fnmatch_line("*graph locks*")
        assert Path(lock).read_bytes() == before

    save("Sigmoid")
    failed = project.runpytest_inprocess()
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(["*Relu*Sigmoid*", "hint: `pytest * --graph-update` accepts *"])
    for noise in ("Traceback*", "*graph_regression.check(*", "E  *", ">  *"):
        failed.stdout.no_fnmatch_line(noise)
    assert Path(lock).read_bytes() == before

    renewed = project.runpytest_inprocess("--graph-update")
    renewed.assert_outcomes(passed=1)
    renewed.stdout.fnmatch_lines([f"{lock}: renewed", "    accepted *Relu*Sigmoid*"])
    assert Path(lock).read_bytes() != before
    project.runpytest_inprocess().assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("test_encoder", "test_encoder"),
        ("TestModels.test_encoder", "TestModels.test_encoder"),
        ("test_encoder[fp16-2]", "test_encoder-fp16-2"),
        ("encoder v1.2", "encoder-v1.2-8f299869"),
        ("../../etc/passwd", "etc-passwd-3754d6cb"),
        ("..", "5ec1f7e7"),
        ("", "e3b0c442"),
    ],
)
def test_a_name_becomes_a_file_name(name: str, file: str) -> None:
    assert safe(name) == file


def test_names_that_are_spelled_alike_stay_apart() -> None:
    names = ["test[a/b]", "test[a b]", "test[a-b]", "test[[a-b]]", "x" * 300, "x" * 301, "test[é]", "test[è]"]
    assert len({safe(name) for name in names}) == len(names)
    assert all(len(safe(name)) < 140 and safe(name).isascii() for name in names)


def test_locks_are_named_after_tests_and_checks(project: pytest.Pytester) -> None:
    file = project.makepyfile("""
        import pytest

        @pytest.mark.parametrize("size", ["s", "m/l"])
        def test_sizes(graph_regression, size):
            graph_regression.check("model.onnx")

        class TestPair:
            def test_both(self, graph_regression):
                graph_regression.check("model.onnx")
                graph_regression.check("model.onnx")
                graph_regression.check("model.onnx", name="decoder")

        def test_twice(graph_regression):
            graph_regression.check("model.onnx", name="one")
            graph_regression.check("model.onnx", name="one")
    """)
    result = project.runpytest_inprocess("--graph-update")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["this test checked `one` already"])
    assert [Path(lock).name.removesuffix(".lock.yaml") for lock in locks()] == [
        "TestPair.test_both+2",
        "TestPair.test_both",
        "decoder",
        "one",
        "test_sizes-m-l-" + safe("test_sizes[m/l]")[-8:],
        "test_sizes-s",
    ]
    assert {str(Path(lock).parent) for lock in locks()} == {file.stem}


def test_a_shared_lock_is_one_truth_also_in_an_update(project: pytest.Pytester) -> None:
    save("Sigmoid", "other.onnx")
    project.makepyfile("""
        def test_a(graph_regression): graph_regression.check("model.onnx", name="both")
        def test_b(graph_regression): graph_regression.check("other.onnx", name="both")
    """)
    result = project.runpytest_inprocess("--graph-update")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["hint: another check of this run wrote this lock*"])


def test_the_folder_of_locks_can_be_chosen(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\naddopts = -p no:cacheprovider\ngraph_locks = locks\n")
    project.mkdir("tests").joinpath("test_deep.py").write_text(CHECK)
    project.runpytest_inprocess("--graph-update").assert_outcomes(passed=1)
    assert locks() == ["locks/tests/test_deep/test_encoder.lock.yaml"]
    project.runpytest_inprocess().assert_outcomes(passed=1)


def test_works_with_xdist_and_names_locks_that_no_test_uses(project: pytest.Pytester) -> None:
    file = project.makepyfile("""
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_many(graph_regression, number):
            graph_regression.check("model.onnx")
    """)
    spare = project.mkdir(file.stem) / "test_gone.lock.yaml"
    spare.touch()
    unused = f"{file.stem}/{spare.name}: no test used it; *"
    result = project.runpytest_subprocess("-n", "2", "--graph-update")
    result.assert_outcomes(passed=4)
    written = [f"{file.stem}/test_many-{number}.lock.yaml: written" for number in range(4)]
    result.stdout.fnmatch_lines([*written, unused])
    assert len(locks()) == 5
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines([unused])
    for some in (["-k", "0 or 1"], [f"{file.name}::test_many"], ["--deselect", f"{file.name}::test_many[2]"]):
        project.runpytest_inprocess(*some).stdout.no_fnmatch_line("*no test used*")
    save("Sigmoid")
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=4)
    result.stdout.no_fnmatch_line("*no test used*")


@pytest.fixture(scope="module")
def exporter() -> None:
    """Parts of PyTorch that can be imported once only are loaded before a run that forgets what it imported."""
    burnish.load(torch.nn.Linear(3, 2), torch.ones(1, 3))


@pytest.mark.usefixtures("exporter")
def test_a_module_is_exported_on_the_spot_and_keeps_its_mode(project: pytest.Pytester) -> None:
    file = project.makepyfile(
        MODULES
        + """
from burnish.tools.check.difference import Report

def test_module(graph_regression):
    net = Net().train()
    net.act.eval()
    report = graph_regression.check(net, X)
    assert isinstance(report, Report) and report.new.inputs == {"x": "float[2,3]"}
    assert net.training and net.linear.training and not net.act.training

def test_samples(graph_regression):
    batch = torch.export.Dim("batch")
    calls = [{"scale": X[:, :2], "x": X}, {"x": torch.zeros(4, 3), "scale": torch.ones(4, 2)}]
    shapes = {"x": {0: batch}, "scale": {0: batch}}
    report = graph_regression.check(Net(), calls, dynamic_shapes=shapes)
    assert report.new.inputs == {"x": "float[batch,3]", "scale": "float[batch,2]"} and len(report.new.values) == 2
    assert [one.sample for one in report.new.values] == ["samples[0]", "samples[1]"]
    assert [one.outputs[next(iter(one.outputs))].type for one in report.new.values] == ["float[2,2]", "float[4,2]"]

def test_program(graph_regression):
    program = torch.export.export(Net(), (X, X[:, :2]))
    report = graph_regression.check(program, {"scale": X[:, :2], "x": X})
    assert list(report.new.inputs) == ["x", "scale"]
"""
    )
    project.runpytest_inprocess("--graph-update").assert_outcomes(passed=3)
    file.write_text(file.read_text().replace("Net().train()", "Net(torch.nn.Sigmoid).train()"))
    result = project.runpytest_inprocess()
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines(["*Relu*Sigmoid*"])
    result.stdout.no_fnmatch_line("*Captured*")


def test_tolerances_and_the_old_model(project: pytest.Pytester) -> None:
    project.makepyfile("""
        def test_tolerant(graph_regression):
            graph_regression.check("model.onnx", tolerance="tolerances.yaml")

        def test_old(graph_regression):
            graph_regression.check("model.onnx", old="old.onnx")
    """)
    fields = ("structure", "operators", "values", "passes")
    Path("tolerances.yaml").write_text("".join(f"{field}: ignore\n" for field in fields))
    save("Relu", "old.onnx")
    project.runpytest_inprocess("--graph-update").assert_outcomes(passed=2)
    save("Sigmoid")
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*first at Sigmoid `act`*"])


@pytest.mark.usefixtures("exporter")
def test_the_documented_tests_pass(project: pytest.Pytester) -> None:
    page = blocks((ROOT / "docs" / "ideas" / "regression.md").read_text())
    (tests,) = (block.text for block in page if block.kind == "python")
    (tolerances,) = (block.text for block in page if block.kind == "yaml" and not block.words)
    project.makepyfile(
        test_documented=tests,
        my_project="""
            import torch

            def Encoder():
                return torch.nn.Embedding(100, 4)
        """,
    )
    project.mkdir("models").joinpath("tolerances.yaml").write_text(tolerances)
    save("Relu", "models/encoder.onnx")
    project.runpytest_inprocess("--graph-update").assert_outcomes(passed=2)
    assert "  input: int64[batch,length]" in Path(locks()[0]).read_text().splitlines()


@pytest.mark.usefixtures("exporter")
def test_what_cannot_be_checked_says_why(project: pytest.Pytester) -> None:
    file = project.makepyfile(
        MODULES
        + """
class Data(torch.nn.Module):
    def forward(self, x): return x if x.sum() > 0 else -x

CASES = {
    "nothing": ((Net(),), {}),
    "arguments": ((Net(), [{"x": X}, {"y": X}]), {}),
    "options": (("model.onnx",), {"dynamic_shapes": {}}),
    "model": ((3,), {}),
    "file": (("lost.onnx",), {}),
    "samples": (("model.onnx", {"z": [[1.0, 2.0, 3.0]]}), {}),
    "tolerance": (("model.onnx",), {"tolerance": "lost.yaml"}),
    "branches": ((Data(), X), {}),
}

@pytest.mark.parametrize("case", CASES)
def test_it(graph_regression, case):
    arguments, options = CASES[case]
    graph_regression.check(*arguments, **options)
"""
    )
    Path(file.stem).mkdir()
    result = project.runpytest_inprocess("--graph-update")
    result.assert_outcomes(failed=8)
    result.stdout.fnmatch_lines(
        [
            "Net: a module needs samples to be exported with",
            "a sample has other arguments than the module was exported with",
            "`dynamic_shapes` is for modules, which are exported",
            "a `int` is not a model",
            "lost.onnx: *",
            "*input `x` is missing*",
            "*lost.yaml: *",
            "Data: the module cannot be traced: *",
        ]
    )
    result.stdout.no_fnmatch_line("E  *")
    assert not locks() and torch.get_num_threads() >= 1


def test_a_lock_that_cannot_be_read_is_not_replaced(project: pytest.Pytester) -> None:
    file = project.makepyfile(CHECK)
    lock = project.mkdir(file.stem) / "test_encoder.lock.yaml"
    lock.write_text("<<<<<<< HEAD\nlock: 1\n")
    for arguments in ([], ["--graph-update"]):
        result = project.runpytest_inprocess(*arguments)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines([f"*{lock.name}:*"])
        assert lock.read_text().startswith("<<<<<<<")


def test_paths_are_found_from_another_folder_and_models_need_not_run(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = MODEL.replace("ACT", "own.Thing").replace('["": ', '["own": 1, "": ')
    Path("models").mkdir()
    onnx.save(onnx.parser.parse_model(text), "models/own.onnx")
    file = project.makepyfile(
        'def test_own(graph_regression): graph_regression.check("models/own.onnx", old="models/own.onnx", run=False)'
    )
    Path("inner").mkdir()
    monkeypatch.chdir("inner")
    for arguments in (["--graph-update"], []):
        result = project.runpytest_subprocess(f"../{file.name}", f"--rootdir={project.path}", *arguments)
        result.assert_outcomes(passed=1)
