"""Chips that need not be here: programs are compiled for them, and not run."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

# Typed from Nvidia's figures; they choose kernels, and take no part in what is measured.
H100 = """
  gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 }
  runtime_version { major: 12 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """


def devices(name: str, count: int) -> list[Any]:
    """Devices that are here (`cpu`), or for `h100` and `v5e` ones that need not be; from there on the library builds its
    programs for a GPU or a TPU.

    Raises:
        ValueError: more devices than are here, or another target.
    """
    if name == "cpu":
        if jax.device_count() < count:
            raise ValueError(
                f"{count} devices are needed, {jax.device_count()} are here: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return list(jax.devices())
    from jax.experimental import topologies

    if name == "h100":
        given = {"platform": "cuda", "topology_name": f"h100x{count}", "target_config": H100, "topology": f"1x1x{count}"}
    elif name == "v5e":
        given = {"platform": "tpu", "topology_name": "v5e:2x2x1", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1}
    else:
        raise ValueError(f"target '{name}' is not known: cpu, h100 or v5e")
    found = topologies.get_topology_desc(**given).devices
    jax.default_backend = lambda: "tpu" if name == "v5e" else "gpu"  # the library asks it which forms of its programs are best
    return list(found)


def with_host_memory(mesh: jax.sharding.Mesh) -> Any:
    """The mesh, or for H100s that are not here an abstract one: jax 0.10 forgets that such devices have a host's memory.
    Programs are then lowered for CUDA, and compiled by `compiled`."""
    if mesh.devices.flat[0].platform != "gpu":
        return mesh
    lower: Any = jax.stages.Traced.lower
    lower.__kwdefaults__["lowering_platforms"] = ("cuda",)
    return mesh.abstract_mesh


def compiled(lowered: Any, devices: list[Any]) -> Any:
    """The compiled program, also of one that was lowered for an abstract mesh over all of the devices."""
    if devices[0].platform != "gpu":
        return lowered.compile()
    # What `lowered.compile(device_assignment=...)` is for; in jax 0.10 it asks a client that is here.
    from jax._src import compiler, lib

    options = compiler.get_compile_options(num_replicas=1, num_partitions=len(devices), device_assignment=np.array([devices]))
    private: Any = lib
    listed = private._jax.DeviceList(tuple(devices))
    return devices[0].client.compile(lowered.compiler_ir(), executable_devices=listed, compile_options=options)


def place(name: str) -> jax.sharding.Sharding:
    """The first device that is here, or for `h100` one that need not be."""
    return jax.sharding.SingleDeviceSharding(devices("h100", 1)[0] if name == "h100" else jax.devices()[0])
