"""Peak memory of this process and its first device."""


def allocator_peak() -> int | None:
    """Most bytes that JAX held on the first device; None where it does not count them, on a CPU."""
    import jax  # not of torch's process

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def process_peak() -> int:
    """Most bytes of this process that were ever in memory (VmHWM)."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024
