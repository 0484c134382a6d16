"""Fourier transforms, windows and mel filters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from burnish.backends.fx.registry import operator
from burnish.backends.fx.values import DTYPES, Tensor, Value, host, integer, integers


def _signal(x: Tensor) -> Tensor:
    """[..., 1] real or [..., 2] complex numbers as a tensor of one axis less, in a dtype that torch transforms."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x[..., 0] if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())


def _transform(x: Tensor, length: int | None, axis: int, inverse: int, onesided: int) -> Tensor:
    axis, signal = axis % x.dim(), _signal(x)
    if inverse and onesided:
        return torch.fft.irfft(signal, length, axis).unsqueeze(-1).to(x.dtype)
    if inverse:
        return torch.view_as_real(torch.fft.ifft(signal, length, axis)).to(x.dtype)
    return torch.view_as_real(_spectrum(signal, length, axis, onesided)).to(x.dtype)


def _spectrum(signal: Tensor, length: int | None, axis: int, onesided: int) -> Tensor:
    if onesided and not signal.is_complex():
        return torch.fft.rfft(signal, length, axis)
    found = torch.fft.fft(signal, length, axis)
    return found.narrow(axis, 0, found.shape[axis] // 2 + 1) if onesided else found


@operator("DFT", since=17, static=(1,))
def dft_by_attribute(x: Tensor, length: Value = None, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    """Before opset 20: the axis is an attribute, 1 by default."""
    return _transform(x, None if length is None else integer(length), axis, inverse, onesided)


@operator("DFT", since=20, static=(1, 2))
def dft(x: Tensor, length: Value = None, axis: Value = -2, inverse: int = 0, onesided: int = 0) -> Tensor:
    """The discrete Fourier transform of [..., 1] real or [..., 2] complex numbers along an axis."""
    along = -2 if axis is None else integer(axis)
    return _transform(x, None if length is None else integer(length), along, inverse, onesided)


@operator("STFT", static=(1, 3), fixed=(2,))
def stft(signal: Tensor, step: Value, window: Value = None, length: Value = None, onesided: int = 1) -> Tensor:
    """Transforms of the frames of `signal` [batch, samples, 1 or 2]: [batch, frames, bins, 2]."""
    count = integer(length) if length is not None else signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, count, integer(step)).transpose(2, 3)
    if window is not None:
        frames = frames * F.pad(window, (0, count - window.shape[0])).unsqueeze(-1)
    return torch.view_as_real(_spectrum(_signal(frames), None, 2, onesided)).to(signal.dtype)


def _cosines(size: Value, periodic: int, kind: int, shares: tuple[float, ...]) -> Tensor:
    """The sum of `shares[k]` cos(2 pi k n / N) for the n of a window."""
    count = integer(size)
    steps = torch.arange(count, dtype=torch.float64) * (2 * math.pi / (count if periodic else count - 1))
    total = torch.full_like(steps, shares[0])
    for k, share in enumerate(shares[1:], 1):
        total = total + share * torch.cos(k * steps)
    return total.to(DTYPES[kind])


@operator("HannWindow", static=(0,))
def hann_window(size: Value, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """A raised cosine."""
    return _cosines(size, periodic, output_datatype, (0.5, -0.5))


@operator("HammingWindow", static=(0,))
def hamming_window(size: Value, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """A raised cosine that does not reach zero."""
    return _cosines(size, periodic, output_datatype, (25 / 46, -21 / 46))


@operator("BlackmanWindow", static=(0,))
def blackman_window(size: Value, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """Two cosines."""
    return _cosines(size, periodic, output_datatype, (0.42, -0.5, 0.08))


@operator("MelWeightMatrix", static=(0, 1, 2, 3, 4))
def mel_weight_matrix(
    bins: Value, length: Value, rate: Value, lower: Value, upper: Value, output_datatype: int = 1
) -> Tensor:
    """Triangular filters [length / 2 + 1, bins] at equal distances on the mel scale."""
    count, size, speed = (integer(v) for v in (bins, length, rate))
    (low,), (high,) = (integers(v) for v in (host(lower), host(upper)))
    first, last = (2595 * math.log10(1 + edge / 700) for edge in (low, high))
    mels = first + torch.arange(count + 2, dtype=torch.float64) * ((last - first) / (count + 2))
    places = torch.floor((size + 1) * (700 * (10 ** (mels / 2595) - 1)) / speed)
    left, centre, right = places[:-2], places[1:-1], places[2:]
    rows = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None]
    rising = torch.where(centre > left, (rows - left) / (centre - left).clamp(min=1), (rows == centre).double())
    falling = (right - rows) / (right - centre).clamp(min=1)
    found = torch.where((rows >= left) & (rows <= centre), rising, torch.zeros_like(rising))
    found = torch.where((rows > centre) & (rows < right), falling, found)
    return found.to(DTYPES[output_datatype])
