"""Randomness is addressed, not consumed: every seed is a function of where it is used."""

import hashlib


def derive_seed(run_seed: int, purpose: str, *address: int) -> int:
    """Derive the seed of one random choice from its address.

    The same address gives the same seed in every process, on every machine and in every order of calls, so a worker
    that is restarted or given another shard draws what the first one would have drawn.

    Args:
        run_seed: the seed of the run.
        purpose: what the randomness is for, e.g. `"sample"`; different purposes never share a stream.
        *address: where it is used, e.g. `step, sample_id`.

    Returns:
        An integer in `[0, 2**63)`: the first eight bytes of BLAKE2b over the written-out address, without the sign bit.
    """
    text = "/".join((str(int(run_seed)), purpose, *(str(int(part)) for part in address)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
