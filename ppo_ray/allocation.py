"""How a process on a CPU allocates memory."""

CPU_ALLOCATION = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_ARENA_MAX": "1",  # actors work in threads, whose own arenas map and unmap every large tensor
}
"""Environment variables by which glibc keeps freed pages: their first touch costs as much as their use."""
