"""The configuration of onnxruntime-genai beside a model whose layers went."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as oir
import pytest

from burnish.backends import genai_config
from burnish.ir.errors import InputError

CONFIG = {
    "model": {
        "bos_token_id": 1,
        "decoder": {
            "inputs": {"past_key_names": "past_key_values.%d.key"},
            "num_hidden_layers": 6,
            "sliding_window": {"window_size": 128, "layers": [0, 2, 4]},
        },
        "vocab_size": 500,
    },
    "search": {"max_length": 2048},
}


def model(states: list[int] | None) -> oir.Model:
    graph = oir.Graph([], [], nodes=[], opset_imports={"": 20})
    found = oir.Model(graph, ir_version=10)
    if states is not None:
        found.metadata_props["burnish.states"] = json.dumps(states)
    return found


def written(folder: Path, content: object) -> Path:
    path = folder / genai_config.NAME
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_number_of_layers_and_their_windows_are_those_that_are_left(tmp_path: Path) -> None:
    text = genai_config.updated(written(tmp_path, CONFIG), model(None), model([0, 1, 4, 5]))
    found = json.loads(text or "")
    assert found["model"]["decoder"]["num_hidden_layers"] == 4
    assert found["model"]["decoder"]["sliding_window"] == {"window_size": 128, "layers": [0, 2]}
    assert list(found) == list(CONFIG) and list(found["model"]) == list(CONFIG["model"])
    found["model"]["decoder"] |= {
        "num_hidden_layers": 6,
        "sliding_window": CONFIG["model"]["decoder"]["sliding_window"],
    }
    assert found == CONFIG


def test_a_model_from_which_layers_went_before_is_described_by_its_own_file(tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["model"]["decoder"] |= {"num_hidden_layers": 4, "sliding_window": {"layers": [0, 2]}}
    text = genai_config.updated(written(tmp_path, config), model([0, 1, 4, 5]), model([1, 4]))
    decoder = json.loads(text or "")["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["sliding_window"]["layers"]) == (2, [1])


def test_a_model_with_the_same_layers_needs_no_other_file(tmp_path: Path) -> None:
    assert genai_config.updated(tmp_path / "none", model(None), model(None)) is None
    assert genai_config.updated(tmp_path / "none", model([0, 2]), model([0, 2])) is None


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "it cannot be read"),
        ([1], "says nothing of"),
        ({"model": {"decoder": {}}}, "says nothing of"),
        ({"model": {"decoder": {"num_hidden_layers": 3}}}, "it speaks of 3 layers"),
    ],
)
def test_a_file_that_is_no_such_configuration_is_refused(tmp_path: Path, content: object, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        genai_config.updated(written(tmp_path, content), model(None), model([0, 1, 4, 5]))


def test_it_is_under_its_name_when_it_is_committed_and_leaves_nothing_else(tmp_path: Path) -> None:
    config, out = written(tmp_path, CONFIG), tmp_path / "out"
    out.mkdir()
    with genai_config.staged("{}", config, out / "m.onnx") as one:
        assert not (out / genai_config.NAME).exists()
        assert one.commit() == [out / genai_config.NAME]
    with genai_config.staged("[]", config, tmp_path / "m.onnx") as one:
        assert one.target == tmp_path / "m.genai_config.json"
    assert json.loads(config.read_text()) == CONFIG
    assert sorted(path.name for path in tmp_path.rglob("*")) == [genai_config.NAME, genai_config.NAME, "out"]


def test_a_folder_in_its_place_is_refused_beforehand(tmp_path: Path) -> None:
    config, out = written(tmp_path, CONFIG), tmp_path / "out"
    (out / genai_config.NAME).mkdir(parents=True)
    with pytest.raises(InputError, match="it is a folder"), genai_config.staged("{}", config, out / "m.onnx"):
        pass
