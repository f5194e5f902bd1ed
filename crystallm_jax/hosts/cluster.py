"""Whether a process is one of several, and which: by the settings, or by what a cluster says of it."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from crystallm_jax.errors import ConfigError

_PORTS = 1 << 16
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# PCI devices of this vendor that are TPUs, v2 and v3 to v7x; its network cards carry the same vendor.
_GOOGLE = "0x1ae0"
_TPU_CHIPS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


class JoinSettings(Protocol):
    """What a user says of the processes of a run; None is left to the cluster.

    Attributes:
        distributed: `auto`, `on` or `off`: whether there are several.
        coordinator_address: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which this is.
        local_device_ids: of the GPUs that it sees, those that are its own, as `0,1`.
    """

    @property
    def distributed(self) -> str | bool: ...  # noqa: D102  as above, here and below
    @property
    def coordinator_address(self) -> str | None: ...  # noqa: D102
    @property
    def num_processes(self) -> int | None: ...  # noqa: D102
    @property
    def process_id(self) -> int | None: ...  # noqa: D102
    @property
    def local_device_ids(self) -> str | None: ...  # noqa: D102


class Machine(NamedTuple):
    """What a process finds around it, beside its environment.

    Attributes:
        gpus: that it sees.
        tpu: whether TPU chips are plugged in.
        kubernetes: whether the package that asks Kubernetes is installed.
    """

    gpus: int = 0
    tpu: bool = False
    kubernetes: bool = False


class Plan(NamedTuple):
    """Whether to join other processes, and as which of them; None is left to jax's own detection.

    Attributes:
        joins: whether there are others.
        why: what says so.
        coordinator_address: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which this is.
        local_device_ids: of the GPUs that it sees, those that are its own.
    """

    joins: bool
    why: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def make_plan(config: JoinSettings, environment: Mapping[str, str], machine: Machine) -> Plan:
    """Decide by the settings, then by what a cluster has put into the environment.

    Raises:
        ConfigError: an address without a possible port, ids that are not numbers, or GPUs that do not divide over
            tasks.
    """
    if config.distributed == "off":
        return Plan(False, "distributed=off")
    address = config.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"coordinator_address={address}: has no port; give HOST:PORT of process 0")
    if address is not None and not 0 < int(address.rsplit(":", 1)[1]) < _PORTS:
        raise ConfigError(f"coordinator_address={address}: its port must be from 1 to {_PORTS - 1}")
    given = _device_ids(config.local_device_ids or environment.get("JAX_LOCAL_DEVICE_IDS"))
    cluster = _cluster(environment, machine, given)
    settings = (address, config.num_processes, config.process_id)
    if any(setting is not None for setting in settings) or config.local_device_ids is not None:
        found = Plan(True, "the settings", *settings, given)
        # A cluster fills in what is not set; all set, it has no say.
        if cluster is None or None not in settings:
            return found
        return found._replace(
            why=f"the settings and {cluster.why}",
            num_processes=cluster.num_processes if config.num_processes is None else config.num_processes,
            process_id=cluster.process_id if config.process_id is None else config.process_id,
            local_device_ids=cluster.local_device_ids,
        )
    if cluster is not None:
        return cluster
    if config.distributed == "on":
        return Plan(True, "distributed=on", local_device_ids=given)
    return Plan(False, "neither settings nor a cluster speak of other processes")


def _device_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise ConfigError(f"local_device_ids={text}: give the numbers of this process's GPUs, such as 0,1")
    return tuple(int(part) for part in text.split(","))


def _cluster(environment: Mapping[str, str], machine: Machine, given: tuple[int, ...] | None) -> Plan | None:
    """The cluster whose step has several tasks, if this process is one of them."""
    if all(name in environment for name in _SLURM):
        # A shell inside a job has the job's number of tasks in SLURM_NTASKS, and is itself a step of one.
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]))
        if tasks > 1:
            here, rank = _slurm_tasks_here(environment), int(environment["SLURM_LOCALID"])
            on_node = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
            ids = given or _own_gpus(machine.gpus, on_node=on_node, tasks=here, rank=rank)
            number = int(environment["SLURM_PROCID"])
            return Plan(True, "SLURM", None, tasks, number, ids)
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        here, rank = (int(environment.get(f"OMPI_COMM_WORLD_LOCAL_{name}", 0)) for name in ("SIZE", "RANK"))
        ids = given or _own_gpus(machine.gpus, on_node=0, tasks=here, rank=rank)
        return Plan(True, "Open MPI", local_device_ids=ids)
    if machine.tpu and "tpu" in (environment.get("JAX_PLATFORMS") or "tpu"):
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        several = int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1 or "," in (hosts or "")
        # Without names the slice's metadata says how many hosts there are; jax asks for it.
        if several or (hosts is None and "TPU_SKIP_MDS_QUERY" not in environment):
            return Plan(True, "a TPU slice")
    if machine.kubernetes and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return Plan(True, "a Kubernetes job", local_device_ids=given)
    return None


def _slurm_tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, from `2(x3),1` and the node's number; 0 where it is not said."""
    counts = [
        int(count)
        for count, times in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        )
        for _ in range(int(times or 1))
    ]
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else int(environment.get("SLURM_NTASKS_PER_NODE") or 0)


def _own_gpus(visible: int, *, on_node: int, tasks: int, rank: int) -> tuple[int, ...] | None:
    """Which of the GPUs that a task sees are its own: jax would take one, whatever the task owns.

    Args:
        visible: how many it sees.
        on_node: how many the job has on the node; 0 where it is not said.
        tasks: of the job on the node; 0 where it is not said.
        rank: of the task among these.
    """
    if not visible or not tasks:
        return None
    if tasks == 1 or visible < max(on_node, tasks):  # alone, or bound to its own already
        return tuple(range(visible))
    if visible % tasks:
        raise ConfigError(
            f"the {visible} GPUs of this node do not divide over its {tasks} tasks: set local_device_ids"
        )
    share = visible // tasks
    return tuple(range(rank * share, (rank + 1) * share))


def find_machine(environment: Mapping[str, str], root: Path = Path("/")) -> Machine:
    """Look around without touching a device."""
    listed = [environment[name] for name in _VISIBLE if name in environment]
    if listed:
        gpus = sum(bool(part) and not part.startswith(("-", "No")) for part in listed[0].split(","))
    else:
        gpus = len(list(root.glob("proc/driver/nvidia/gpus/*")))
    tpu = any(
        vendor.read_text().strip() == _GOOGLE and vendor.with_name("device").read_text().strip() in _TPU_CHIPS
        for vendor in root.glob("sys/bus/pci/devices/*/vendor")
    )
    return Machine(gpus, tpu, importlib.util.find_spec("kubernetes") is not None)
