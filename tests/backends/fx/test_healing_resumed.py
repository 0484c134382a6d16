"""Healing step by step: the same seed and a killed run give the same bytes, in one process or two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest
from fx_checks import bytes_of
from healing_checks import QUICK

from burnish.backends.fx.healing import Progress, forget, heal
from burnish.ir.samples import Sample


def test_the_same_seed_gives_the_same_bytes(vit: oir.Model, short: oir.Model, samples: list[Sample]) -> None:
    one, two, other = (
        bytes_of(heal(short, vit, samples, replace(QUICK, steps=4, seed=seed)).model) for seed in (0, 0, 1)
    )
    assert one == two != other


KILLED = """
import os, signal, sys
from pathlib import Path
import healing_checks as t
from burnish.backends.fx.healing import heal
vit, samples = t.digits_vit(), t.digits(160)
def kill(progress):
    if progress.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
heal(t.without(vit, 1), vit, samples, t.QUICK, kill, folder=Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    vit: oir.Model, short: oir.Model, samples: list[Sample], tmp_path: Path
) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parents[2] / ".src"), str(tests.parents[1])])}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(tmp_path.glob("heal-*.pt"))) == 1
    told: list[Progress] = []
    healed = heal(short, vit, samples, QUICK, told.append, folder=tmp_path)
    assert told[0].step == 13 and healed.steps == 20 and len(healed.history) == 10
    assert bytes_of(healed.model) == bytes_of(heal(short, vit, samples, QUICK).model)
    again = heal(short, vit, samples, QUICK, None, folder=tmp_path)
    assert bytes_of(again.model) == bytes_of(healed.model) and again.history == healed.history
    assert healed.checkpoint is not None and list(tmp_path.iterdir()) == [healed.checkpoint]
    healed.checkpoint.with_name(f"{healed.checkpoint.name}.1.partial").touch()
    forget(healed.checkpoint)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_as_good_as_none(
    vit: oir.Model, short: oir.Model, samples: list[Sample], tmp_path: Path
) -> None:
    def spoil(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    options = replace(QUICK, steps=4, evaluations=4)
    with pytest.raises(KeyboardInterrupt):
        heal(short, vit, samples, options, spoil, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert heal(short, vit, samples, options, folder=tmp_path).steps == 4


RANKS = """
import os, sys
from dataclasses import replace
from pathlib import Path
import healing_checks as t
import numpy as np
from burnish.backends.fx.healing import heal
vit, samples = t.digits_vit(), t.digits(51)
options = replace(t.QUICK, steps=4, batch=7, loss="both", features=1.0)
healed = heal(t.without(vit, 1), vit, samples, options, folder=Path(sys.argv[1]))
if os.environ.get("RANK", "0") == "0":
    weights = {name: value.const_value.numpy() for name, value in healed.model.graph.initializers.items()}
    np.savez(Path(sys.argv[1]) / f"{os.environ.get('WORLD_SIZE', '1')}.npz", **weights)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Batches of seven rows, so that the processes have unequal shares; the last batch has one row for one of them."""
    pytest.importorskip("accelerate")
    tests = Path(__file__).parent
    paths = [str(tests.parents[2] / ".src"), str(tests.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    (tmp_path / "run.py").write_text(RANKS)
    script = [str(tmp_path / "run.py"), str(tmp_path)]
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / f"{world}.npz") for world in (1, 2))
    assert set(one.files) == set(two.files)
    for name in one.files:
        np.testing.assert_allclose(one[name], two[name], atol=2e-5, err_msg=name)
