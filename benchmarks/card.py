"""What the device at hand could do at best: operations per second, and memory."""

import resource
import sys
import time
from dataclasses import dataclass

import psutil
import torch

_PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIE": 756,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
    "3090": 71,
}
"""Dense bfloat16 products, TFLOP/s, by the makers' data sheets, without sparsity; words of the card's name."""


@dataclass(frozen=True)
class Peak:
    """The most that a device could do."""

    tflops: float
    """bfloat16 products, 10^12 operations per second."""
    source: str
    """Where that is known from."""


def data_sheet_peak(card: str) -> float | None:
    """Return a card's peak in TFLOP/s by its name, e.g. `NVIDIA A100-SXM4-80GB`; None if it is not listed."""
    words = set(card.upper().replace("-", " ").split())
    fitting = [name for name in _PEAKS if words.issuperset(name.split())]
    if "MIG" in words or not fitting:  # a slice has but a part of it
        return None
    return float(_PEAKS[max(fitting, key=len)])


def find_peak(device: torch.device, given: float | None = None) -> Peak:
    """Return the peak that was given, or that of the card's data sheet, or what a large product reaches here."""
    if given is not None:
        return Peak(given, "given")
    if device.type == "cuda" and (listed := data_sheet_peak(torch.cuda.get_device_name(device))):
        return Peak(listed, "the card's data sheet")
    return Peak(_product_tflops(device), "a large product, measured")


def name_of(device: torch.device) -> str:
    """Return the card's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def free_bytes(device: torch.device) -> int:
    """Return the memory that a process could still get."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Begin to watch the peak anew; a CPU's is that of the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors have taken on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def _product_tflops(device: torch.device) -> float:
    """Time a square product in bfloat16: the best of five."""
    size = 8192 if device.type == "cuda" else 512
    first, second = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    first @ second  # the first call chooses its kernel
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        first @ second
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12
