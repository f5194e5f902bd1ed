"""Which process joins which: by the settings and by what clusters put into the environment."""

from pathlib import Path

import pytest

from crystallm_jax.errors import ConfigError
from crystallm_jax.hosts.cluster import Machine, Plan, find_machine, make_plan
from crystallm_jax.train_run.train_config import TrainConfig

# SLURM's variables in a task: here the second of four, two on each of two nodes.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
ONE_A_NODE = {
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        # Of the GPUs that both tasks of the node see, the upper half.
        ({"SLURM_GPUS_ON_NODE": "4"}, 4, (4, 1, (2, 3))),
        ({"SLURM_GPUS_ON_NODE": "2"}, 2, (4, 1, (1,))),
        # Bound to its own: it sees fewer than there are.
        ({"SLURM_GPUS_ON_NODE": "2"}, 1, (4, 1, (0,))),
        ({"SLURM_GPUS_ON_NODE": "4"}, 2, (4, 1, (0, 1))),
        # Alone on its node: all that it sees, not the one that jax would take.
        ({**ONE_A_NODE, "SLURM_GPUS_ON_NODE": "8"}, 8, (2, 1, tuple(range(8)))),
        (ONE_A_NODE, 8, (2, 1, tuple(range(8)))),
        # Nodes with different numbers of tasks.
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "1,3",
                "SLURM_NODEID": "1",
                "SLURM_LOCALID": "2",
                "SLURM_PROCID": "3",
            },
            6,
            (4, 3, (4, 5)),
        ),
        # An older SLURM says it otherwise; without a word on GPUs, jax decides.
        ({"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_NTASKS_PER_NODE": "2"}, 4, (4, 1, (2, 3))),
        ({}, 0, (4, 1, None)),
    ],
)
def test_a_slurm_task_joins_with_all_gpus_that_are_its_own(
    changes: dict[str, str], gpus: int, expected: tuple[int, int, tuple[int, ...] | None]
) -> None:
    plan = make_plan(TrainConfig(), SLURM | changes, Machine(gpus=gpus))
    assert plan == Plan(True, "SLURM", None, *expected)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # A shell of one task inside a job of four, and a job without `srun`.
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in SLURM.items() if "STEP" not in name},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
    ids=["nothing", "shell", "batch", "mpi", "kubernetes", "tpu"],
)
def test_a_process_that_is_alone_joins_nothing(environment: dict[str, str]) -> None:
    machine = Machine(gpus=8, tpu="TPU_WORKER_HOSTNAMES" in environment, kubernetes=True)
    assert not make_plan(TrainConfig(), environment, machine).joins
    assert make_plan(TrainConfig(distributed="on"), environment, machine) == Plan(True, "distributed=on")


@pytest.mark.parametrize(
    ("environment", "machine", "why"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Machine(), "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Machine(tpu=True), "a TPU slice"),
        ({}, Machine(tpu=True), "a TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Machine(tpu=True), "a TPU slice"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
            Machine(kubernetes=True),
            "a Kubernetes job",
        ),
    ],
)
def test_clusters_are_joined_as_jax_finds_them(
    environment: dict[str, str], machine: Machine, why: str
) -> None:
    assert make_plan(TrainConfig(), environment, machine) == Plan(True, why)
    assert not make_plan(TrainConfig(distributed="off"), environment, machine).joins


def test_a_tpu_host_that_is_to_use_its_cpu_joins_no_slice() -> None:
    environment = {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}
    assert not make_plan(TrainConfig(), environment, Machine(tpu=True)).joins
    assert make_plan(TrainConfig(), environment | {"JAX_PLATFORMS": "tpu,cpu"}, Machine(tpu=True)).joins


def test_an_mpi_task_that_is_alone_on_its_node_takes_all_gpus() -> None:
    environment = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    plan = make_plan(TrainConfig(), environment, Machine(gpus=4))
    assert plan.local_device_ids == (0, 1, 2, 3)


def test_settings_go_before_the_cluster_which_fills_them_in() -> None:
    complete = TrainConfig(coordinator_address="host:1234", num_processes=2, process_id=1)
    assert make_plan(complete, SLURM, Machine(gpus=4)) == Plan(True, "the settings", "host:1234", 2, 1)
    partly = TrainConfig(coordinator_address="host:1234", local_device_ids="0, 3")
    expected = Plan(True, "the settings and SLURM", "host:1234", 4, 1, (0, 3))
    assert make_plan(partly, SLURM, Machine(gpus=4)) == expected
    variable = make_plan(TrainConfig(), {"JAX_COORDINATOR_ADDRESS": "host:1"}, Machine())
    assert variable == Plan(True, "the settings", "host:1")


@pytest.mark.parametrize(
    ("config", "environment", "parts"),
    [
        (TrainConfig(coordinator_address="host"), {}, ("coordinator_address=host", "HOST:PORT")),
        (TrainConfig(local_device_ids="all"), {}, ("local_device_ids=all", "0,1")),
        (TrainConfig(), SLURM, ("3 GPUs", "2 tasks", "local_device_ids")),
    ],
)
def test_what_cannot_be_joined_is_refused_in_one_line(
    config: TrainConfig, environment: dict[str, str], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(config, environment, Machine(gpus=3))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_machine_is_looked_at_without_touching_a_device(tmp_path: Path) -> None:
    assert find_machine({}, tmp_path)[:2] == (0, False)
    for number in range(2):
        (tmp_path / "proc/driver/nvidia/gpus" / str(number)).mkdir(parents=True)
    assert find_machine({}, tmp_path).gpus == 2
    for visible, gpus in (("0,1,2", 3), ("GPU-1f", 1), ("", 0), ("NoDevFiles", 0), ("-1", 0)):
        assert find_machine({"CUDA_VISIBLE_DEVICES": visible}, tmp_path).gpus == gpus
    for device, is_tpu in (("0x0042", False), ("0x0063", True)):
        folder = tmp_path / "sys/bus/pci/devices" / device
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{device}\n")
        assert find_machine({}, tmp_path).tpu == is_tpu
