"""Chips that need not be here: programs are compiled for them, and not run."""

from __future__ import annotations

import jax

# Typed from Nvidia's figures; they choose kernels, and take no part in what is measured.
H100 = """
  gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 }
  runtime_version { major: 12 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """


def place(name: str) -> jax.sharding.Sharding:
    """The first device that is here, or for `h100` one that need not be, by jax-cuda12-pjrt and jax-cuda12-plugin; from there
    on the library builds its programs for a GPU."""
    if name != "h100":
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1").devices
    jax.default_backend = lambda: "gpu"  # the library asks it which form of a product and how many logits at a time are best
    return jax.sharding.SingleDeviceSharding(devices[0])
