"""Tensors under a mask: checks of ranks, shapes and dtypes; sums, means, variances and whitening of the True entries.

Public functions of this package check their arguments here in their first lines: a tensor of a wrong shape would be
broadcast without an error. Dimensions: B sequences, R response tokens.
"""

import torch

_WHITEN_EPS = 1e-8  # TRL 0.11, core.py `masked_whiten`


def check_tokens(mask: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Check per-token tensors against their mask.

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
    """Check per-sequence tensors against the mask of their tokens.

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


def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum `x` where `mask`: sum_t m_t x_t, a scalar.

    Entries outside the mask are replaced, not multiplied by zero, so NaN there is harmless, in the gradient too.
    """
    check_tokens(mask, x=x)
    return torch.where(mask, x, 0).sum()


def weighted_sum(x: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum `x` where `mask`, each row by its weight: sum_i w_i sum_t m_it x_it, a scalar.

    Args:
        x: `[B, R]` floating point.
        mask: `[B, R]` bool.
        weights: `[B]`, of each token of a row; see `losses.token_weights`.
    """
    check_tokens(mask, x=x)
    check_rows(mask, weights=weights)
    return (torch.where(mask, x, 0).sum(1) * weights).sum()


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average `x` where `mask`: sum_t m_t x_t / sum_t m_t, a scalar.

    Raises:
        ValueError: the mask is empty.
    """
    check_tokens(mask, x=x)
    return masked_sum(x, mask) / _count(mask, at_least=1)


def masked_var(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the unbiased variance of `x` where `mask`: sum_t m_t (x_t - mean)^2 / (n - 1), a scalar.

    TRL 0.11, core.py `masked_var(unbiased=True)`.

    Raises:
        ValueError: the mask has fewer than two True entries.
    """
    check_tokens(mask, x=x)
    count = _count(mask, at_least=2)
    x = torch.where(mask, x, 0)  # before squaring: the gradient of a masked NaN's square is NaN
    return masked_sum((x - masked_mean(x, mask)).square(), mask) / (count - 1)


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale `x` to variance one where `mask`: (x - mean) / sqrt(var + 1e-8), var unbiased.

    TRL 0.11, core.py `masked_whiten`. It is computed in float64: in float32 a constant of 100.1 becomes 0.15, not 0.

    Args:
        x: `[B, R]` floating point.
        mask: `[B, R]` bool.
        shift_mean: False adds the mean back, as TRL does for rewards.

    Returns:
        `[B, R]` of `x`'s dtype, zero outside the mask.

    Raises:
        ValueError: the mask has fewer than two True entries.
    """
    check_tokens(mask, x=x)
    exact = torch.where(mask, x, 0).double()
    mean, var = masked_mean(exact, mask), masked_var(exact, mask)
    whitened = (exact - mean) * torch.rsqrt(var + _WHITEN_EPS)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0).to(x.dtype)


def whiten_zero(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whiten a zero as `masked_whiten(x, mask, shift_mean=False)` whitens `x`: mean - mean / sqrt(var + 1e-8).

    TRL 0.11 leaves this scalar in the padding.
    """
    check_tokens(mask, x=x)
    exact = x.double()
    mean = masked_mean(exact, mask)
    return (mean - mean * torch.rsqrt(masked_var(exact, mask) + _WHITEN_EPS)).to(x.dtype)


def _count(mask: torch.Tensor, at_least: int) -> int:
    count = int(mask.sum())
    if count < at_least:
        raise ValueError(f"the mask has {count} True entries; this needs at least {at_least}")
    return count
