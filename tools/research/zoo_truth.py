"""What the models of the zoo are made of, read from the source of their modules, for the views to be checked against.

`of(name)` gives the `Truth` of an ONNX file of `zoo_families.FILES` or of a trained model of the zoo. Nothing here was
read from an ONNX file, except for the models that come as ONNX files (`a4` to `a6`), whose papers are named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from burnish.tools.research import zoo_families


@dataclass(frozen=True)
class Attend:
    """One attention layer.

    Attributes:
        heads, kv_heads: query heads, and heads of keys and values.
        head_size: elements of a head of queries, keys and values.
        scale: of the scores; None for head_size ** -0.5.
        causal: a token does not see later ones.
        cross: keys and values come from another sequence.
        window: so many last tokens are seen, itself included; None for all.
        rotary: elements of a head that are rotated.
        norms: queries and keys are normed for each head.
        packed: one matrix makes queries, keys and values.
        softcap: the bound of the scores' tanh.
        bias: something learnt is added to the scores.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float | None = None
    causal: bool = False
    cross: bool = False
    window: int | None = None
    rotary: int = 0
    norms: bool = False
    packed: bool = False
    softcap: float | None = None
    bias: bool = False


@dataclass(frozen=True)
class Blocks:
    """A run of equal residual blocks.

    Attributes:
        count: how many.
        parts: what each adds to its residual stream, in order; a "+" joins what adds in parallel.
        form: "pre" (norm before each part), "post" (norm after each sum), "both" (norm before and after each part),
            "cnn" (convolutions, with or without an activation after the sum).
        fixed: why none of them can be dropped: "shape" (input and output differ), "skip" (the input is concatenated
            with a skip); empty when they can.
        pattern: a letter for each, repeated; blocks of one letter differ in the numbers of their weights only.
    """

    count: int
    parts: tuple[str, ...]
    form: str
    fixed: str = ""
    pattern: str = "A"


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: how many there are, and how many a token takes."""

    number: int
    top: int


@dataclass(frozen=True)
class Truth:
    """A model.

    Attributes:
        attention: the attention layers in the order in which they run.
        blocks: the runs of residual blocks in that order.
        cache: for each layer that has one, its inputs' names and its outputs' names.
        cached: what they hold, "attention" or "state".
        experts: the layers of experts.
        codebooks: codes and features of each codebook.
        embedding: rows and width of the table that ids are looked up in.
        head: classes and width of the last linear layer, whose result is an output but for elementwise operators.
        tied: the head's matrix is the embedding.
        softcap: the bound of the tanh behind the head; 0 for none.
    """

    attention: tuple[Attend, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    cache: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    cached: str = ""
    experts: tuple[Experts, ...] = ()
    codebooks: tuple[tuple[int, int], ...] = ()
    embedding: tuple[int, int] | None = None
    head: tuple[int, int] | None = None
    tied: bool = False
    softcap: float = 0.0


LAYER = ("attention", "mlp")


def of(name: str) -> Truth:
    """The truth about an ONNX file of the zoo. KeyError for one that has none."""
    if name in zoo_families.FILES:
        return FAMILIES[zoo_families.FILES[name][0]]
    return REAL[name]


def _ports(
    layers: int, past: str = "past_key_values", present: str = "present"
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    kinds = ("key", "value")
    return tuple(
        (tuple(f"{past}.{layer}.{kind}" for kind in kinds), tuple(f"{present}.{layer}.{kind}" for kind in kinds))
        for layer in range(layers)
    )


def _decoder(layers: int, width: int, layer: Attend, rows: int = 500) -> Truth:
    return Truth(
        attention=(replace(layer, causal=True),) * layers,
        blocks=(Blocks(layers, LAYER, "pre"),),
        embedding=(rows, width),
        head=(rows, width),
    )


def _residual_stages(*runs: tuple[int, str]) -> tuple[Blocks, ...]:
    return tuple(Blocks(count, ("conv",), "cnn", fixed) for count, fixed in runs)


_LLAMA = _decoder(4, 48, Attend(6, 2, 8, rotary=8))
_GEMMA_LOCAL = Attend(4, 2, 16, scale=24**-0.5, causal=True, window=6, rotary=16, softcap=50.0)
_GEMMA3_LOCAL = Attend(4, 1, 16, causal=True, window=6, rotary=16, norms=True)
_QWEN = _decoder(4, 40, Attend(4, 2, 16, rotary=16, norms=True))
_T5_SELF = Attend(4, 4, 16, scale=1.0, bias=True)
_UNET_LOW = (Attend(4, 4, 8), Attend(4, 4, 8, cross=True))
_UNET_HIGH = (Attend(4, 4, 16), Attend(4, 4, 16, cross=True))
_UNET_CONV = Blocks(1, ("conv",), "pre")
_UNET_TRANSFORMER = Blocks(1, ("attention", "cross-attention", "mlp"), "pre")
_UNET_FIXED = replace(_UNET_CONV, fixed="skip")
_GENAI = replace(_decoder(3, 48, Attend(4, 2, 16, rotary=16)), cache=_ports(3), cached="attention")

FAMILIES: dict[str, Truth] = {
    "resnet": Truth(
        blocks=_residual_stages((1, "shape"), (2, ""), (1, "shape"), (2, ""), (1, "shape"), (1, "")), head=(20, 128)
    ),
    "resnet-basic": Truth(
        blocks=_residual_stages((2, ""), (1, "shape"), (1, ""), (1, "shape"), (2, "")), head=(20, 64)
    ),
    "mobilenet": Truth(blocks=_residual_stages((1, ""), (2, ""), (2, ""), (1, "")), head=(20, 96)),
    "efficientnet": Truth(blocks=_residual_stages((2, ""), (2, ""), (1, "")), head=(20, 96)),
    "vit-timm": Truth(attention=(Attend(3, 3, 16, packed=True),) * 5, blocks=(Blocks(5, LAYER, "pre"),), head=(20, 48)),
    "swin": Truth(
        attention=(Attend(2, 2, 12, packed=True, bias=True),) * 2
        + (Attend(4, 4, 12, packed=True, bias=True),) * 2
        + (Attend(8, 8, 12, packed=True, bias=True),) * 4,
        blocks=tuple(Blocks(count, LAYER, "pre", pattern="AB") for count in (2, 2, 4)),
        head=(20, 96),
    ),
    "unet": Truth(
        attention=_UNET_LOW * 2 + _UNET_HIGH + _UNET_LOW * 3,
        blocks=(
            *(_UNET_CONV, _UNET_TRANSFORMER) * 2,
            replace(_UNET_CONV, fixed="shape"),
            _UNET_CONV,
            *(_UNET_CONV, _UNET_TRANSFORMER, _UNET_CONV),
            *(_UNET_FIXED,) * 3,
            *(_UNET_FIXED, _UNET_TRANSFORMER) * 3,
        ),
    ),
    "bert-s": Truth(attention=(Attend(4, 4, 12),) * 4, blocks=(Blocks(4, LAYER, "post"),), embedding=(500, 48)),
    "gpt2": replace(_decoder(4, 48, Attend(3, 3, 16, packed=True)), tied=True),
    "llama-nocache": _LLAMA,
    "llama-kv": replace(_LLAMA, cache=_ports(4), cached="attention"),
    "gemma": Truth(
        attention=(_GEMMA_LOCAL, replace(_GEMMA_LOCAL, window=None)) * 2,
        blocks=(Blocks(4, LAYER, "both", pattern="AB"),),
        embedding=(500, 48),
        head=(500, 48),
        tied=True,
        softcap=30.0,
    ),
    "gemma-kv": Truth(
        attention=(_GEMMA3_LOCAL, _GEMMA3_LOCAL, replace(_GEMMA3_LOCAL, window=None)) * 2,
        blocks=(Blocks(6, LAYER, "both", pattern="AAB"),),
        cache=_ports(6),
        cached="attention",
        embedding=(500, 48),
        head=(500, 48),
        tied=True,
    ),
    "qwen": replace(_QWEN, cache=_ports(4), cached="attention", tied=True),
    "phi": replace(_decoder(4, 48, Attend(3, 3, 16, rotary=8)), blocks=(Blocks(4, ("attention+mlp",), "pre"),)),
    "t5": Truth(
        attention=(_T5_SELF,) * 3 + (replace(_T5_SELF, causal=True), Attend(4, 4, 16, scale=1.0, cross=True)) * 3,
        blocks=(Blocks(3, LAYER, "pre"), Blocks(3, ("attention", "cross-attention", "mlp"), "pre")),
        embedding=(500, 48),
        head=(500, 48),
        tied=True,
    ),
    "mixtral": replace(
        _decoder(3, 48, Attend(6, 2, 8, rotary=8)),
        blocks=(Blocks(3, ("attention", "moe"), "pre"),),
        experts=(Experts(4, 2),) * 3,
    ),
    "mamba": Truth(
        blocks=(Blocks(4, ("state",), "pre"),),
        cache=tuple(
            ((f"conv_state.{i}", f"ssm_state.{i}"), (f"present_conv.{i}", f"present_ssm.{i}")) for i in range(4)
        ),
        cached="state",
        embedding=(500, 32),
        head=(500, 32),
        tied=True,
    ),
    "codec": Truth(blocks=_residual_stages((2, ""), (2, "")), codebooks=((40, 24), (40, 24))),
    "genai-llama": _GENAI,
    "genai-window": replace(
        _GENAI,
        attention=(
            Attend(4, 2, 16, causal=True, window=6, rotary=16, packed=True),
            Attend(4, 2, 16, causal=True, rotary=16, packed=True),
        )
        * 2,
        blocks=(Blocks(4, LAYER, "pre", pattern="AB"),),
        cache=_ports(4),
    ),
    "genai-qwen": replace(_GENAI, attention=(Attend(4, 2, 16, causal=True, rotary=16, norms=True),) * 3),
    "genai-mha": replace(_GENAI, attention=(Attend(4, 4, 16, causal=True, rotary=16),) * 3),
    "genai-moe": replace(_GENAI, blocks=(Blocks(3, ("attention", "moe"), "pre"),), experts=(Experts(4, 2),) * 3),
    "tf-bert": Truth(attention=(Attend(4, 4, 12),) * 3, blocks=(Blocks(3, LAYER, "post"),), embedding=(500, 48)),
}
FAMILIES["mixtral-loop"] = FAMILIES["mixtral"]

_MINILM = Truth(attention=(Attend(12, 12, 32),) * 6, blocks=(Blocks(6, LAYER, "post"),), embedding=(30522, 384))
_SMOLLM = replace(_decoder(30, 576, Attend(9, 3, 64, rotary=64), rows=49152), tied=True)
_SILERO = Truth(cache=((("state",), ("stateN",)),), cached="state")

REAL: dict[str, Truth] = {
    # EfficientNet-lite0: stages of 1, 2, 2, 3, 3, 4 and 1 blocks, the first of each without a shortcut.
    "a1-efficientnet": Truth(blocks=_residual_stages((1, ""), (1, ""), (2, ""), (2, ""), (3, "")), head=(1000, 1280)),
    "a2-minilm": _MINILM,
    "a3-smollm2-nocache": _SMOLLM,
    "a3-smollm2-kv": replace(_SMOLLM, cache=_ports(30), cached="attention"),
    # An STFT as convolution, four convolutions, one LSTM, one 1x1 convolution (github.com/snakers4/silero-vad).
    "a4-silero": _SILERO,
    "a4-silero-op18-ifless": _SILERO,
    "a4-silero-16k-sequence": Truth(cache=((("h", "c"), ("hn", "cn")),), cached="state"),
    # One-hot bytes through a dense layer, one convolution, pooling, a dense layer (arXiv:2409.13768).
    "a5-magika": Truth(embedding=(257, 64), head=(214, 512)),
    # PP-LCNetV3 without shortcuts; RSE-FPN adds squeeze-and-excitation to its input after each of 8 convolutions.
    "a6-ppocr-det": Truth(blocks=_residual_stages(*((1, ""),) * 8)),
    # PP-LCNetV3 and two blocks of SVTR (arXiv:2205.00159), then a linear layer over the characters.
    "a6-ppocr-rec": Truth(
        attention=(Attend(8, 8, 15, packed=True),) * 2, blocks=(Blocks(2, LAYER, "pre"),), head=(6625, 120)
    ),
    # MobileNetV3-small (arXiv:1905.02244) of width 0.35: blocks 3, 5 and 6, 7, 8, 10 and 11 keep their shape.
    "a6-ppocr-cls": Truth(blocks=_residual_stages((1, ""), (2, ""), (1, ""), (1, ""), (2, "")), head=(2, 200)),
}
