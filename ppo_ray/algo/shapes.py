"""Checks of ranks, shapes and dtypes: a silent broadcast is the field's worst bug."""

import torch


def check_tokens(mask: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Check per-token figures against their mask.

    Args:
        mask: `[B, R]` bool.
        **tensors: by the name to use in the message; each `[B, R]`, floating point.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a rank or shape is wrong.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; it must be torch.bool")
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be [B, R]")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be the mask's, {tuple(mask.shape)}")


def check_rows(mask: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Check per-sequence figures against the mask of their tokens.

    Args:
        mask: `[B, R]` bool.
        **tensors: by the name to use in the message; each `[B]`, floating point.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a rank or shape is wrong.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
        if tensor.shape != mask.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [B], ({len(mask)},)")


def check_prefix(mask: torch.Tensor) -> None:
    """Check that every row's True entries come first and number at least one.

    Raises:
        ValueError: a row is empty or has a hole; the message names the row.
    """
    wrong = ~mask.any(1) | (mask[:, 1:] & ~mask[:, :-1]).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"mask row {row} must be some True, then only False; it is {mask[row].int().tolist()}")
