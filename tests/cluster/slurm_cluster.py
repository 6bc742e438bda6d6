"""A real Slurm of one controller and a few nodes on this machine, all its files in one folder, gone when it is closed.

Every machine is a set of Linux namespaces: its own network with its own address on a bridge, host name, hosts file,
IPC and process ids. So an address of 127.0.0.1 leads astray as it would on a cluster, nothing of it can collide with
another test run or be seen from outside, and killing a machine's first process takes everything in it along.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "setpriv", "ip")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
CONTROLLER = "control"
SUBNET = "198.18.0"
ROOT = Path(__file__).parents[2]
PATIENCE_S = 150  # with what ends: beside a busy neighbour all may take several times as long as alone
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
}

SLURM_CONF = """
ClusterName=test
SlurmctldHost={controller}({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%h
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%h.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%h.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
MinJobAge=3600
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=cancels Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=20
PartitionName=cancels_at_once Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=8 RealMemory=2000 Gres=gpu:2 State=UNKNOWN"


def missing() -> str | None:
    """Why no cluster can be made here, or None."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    if absent:
        return (
            f"{', '.join(absent)} not installed: "
            "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
        )
    if os.geteuid() != 0:
        return "only root can make the network namespaces of a test cluster"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """A set of namespaces, held open by a process that reaps what others leave behind in it."""

    def __init__(self, name: str, address: str, hosts: Path) -> None:
        self.name, self.address = name, address
        setup = f'hostname "{name}" && ip link set lo up && mount --bind "{hosts}" /etc/hosts && echo ready'
        self.process = subprocess.Popen(
            # setpriv: should pytest itself be killed, the kernel clears this away.
            [*DIES_WITH_US, "unshare", *NAMESPACES, "bash", "-c", f"{setup}; while :; do sleep 3600 & wait; done"],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        if self.process.stdout is None or self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces for {name}")
        self.pid = self._first_process()

    def _first_process(self) -> int:
        """The pid, seen from outside, of the process that is number 1 inside."""
        parent = self.process.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def command(self, *arguments: str, mount: bool = True) -> list[str]:
        """The command line that runs this in the machine; without its mounts, in the caller's working directory."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--ipc", "--pid", *["--mount"] * mount]
        return [*enter, "--", *arguments]

    def run(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), check=True, capture_output=True, text=True)

    def close(self) -> None:
        """Kill the first process; the kernel kills the others in its pid namespace, and drops the network."""
        self.process.kill()  # unshare; --kill-child takes the first process along
        self.process.wait()


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    number: int
    log: Path

    def facts(self) -> dict[str, str]:
        """What the controller says of it."""
        text = self.cluster.client("scontrol", "show", "job", "--oneliner", str(self.number))
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait(self) -> dict[str, str]:
        """Until it has ended: its facts then."""
        return self.wait_for(lambda facts: facts["JobState"] in ENDED)

    def wait_for(self, happened: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Until something has happened; that can't once the job has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            facts = self.facts()
            if happened(facts):
                return facts
            if facts["JobState"] in ENDED:
                raise AssertionError(f"the job ended before: {facts['JobState']}\n{self.output()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {PATIENCE_S} s: {facts}\n{self.output()}\n{self.cluster.logs()}")
            time.sleep(0.2)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@dataclass
class Cluster:
    """munged, slurmctld and a slurmd a node."""

    folder: Path
    node_count: int = 2
    machines: dict[str, Machine] = field(default_factory=dict)
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """This process' own, without a Slurm it may itself run under and what the launch decides."""
        decided = r"(SLURM|SBATCH|SRUN|RANK$|WORLD_SIZE$|MASTER_|OMP_NUM_THREADS)"
        outer = {k: v for k, v in os.environ.items() if not re.match(decided, k)}
        return {**outer, "SLURM_CONF": str(self.folder / "slurm.conf"), "SLURM_TMPDIR": str(self.folder / "local")}

    @property
    def site(self) -> str:
        """A file in place of slurm/site.sh, for jobs of the checkout itself: logs and the nodes' own disks lie here."""
        return str(self.folder / "site.sh")

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._wire()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _nodes(self) -> dict[str, str]:
        return {f"node{i}": f"{SUBNET}.{10 + i}" for i in range(1, self.node_count + 1)}

    def _write_files(self) -> None:
        folder, nodes = self.folder, self._nodes()
        (folder / "state").mkdir(parents=True)
        lines = "\n".join(NODE.format(name=name, address=address) for name, address in nodes.items())
        conf = SLURM_CONF.format(controller=CONTROLLER, subnet=SUBNET, folder=folder, nodes=lines)
        (folder / "slurm.conf").write_text(conf)
        decided = f"LOGS={folder}/logs\nLOCAL_DISK={folder}/disk-$(hostname)\n"
        (folder / "site.sh").write_text((ROOT / "slurm/site.sh").read_text() + decided)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for i in range(2):  # a GPU needs a device file, or CUDA_VISIBLE_DEVICES stays empty
            (folder / f"gpu{i}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={folder}/gpu{i}\n" for i in range(2)))
        hosts = {"localhost": "127.0.0.1", CONTROLLER: f"{SUBNET}.1", **nodes}
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _wire(self) -> None:
        """The controller's machine holds the bridge; each node has a cable to it."""
        for name, address in {CONTROLLER: f"{SUBNET}.1", **self._nodes()}.items():
            self.machines[name] = Machine(name, address, self.folder / "hosts")
        control = self.machines[CONTROLLER]
        control.run("ip", "link", "add", "bridge", "type", "bridge")
        control.run("ip", "address", "add", f"{control.address}/24", "dev", "bridge")
        control.run("ip", "link", "set", "bridge", "up")
        for name in self._nodes():
            node, cable = self.machines[name], f"to-{name}"
            # The node's pid is meant from outside its pid namespace: only the network is entered here.
            add = ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid)]
            subprocess.run(["nsenter", "--target", str(control.pid), "--net", "--", *add], check=True)
            control.run("ip", "link", "set", cable, "master", "bridge", "up")
            node.run("ip", "address", "add", f"{node.address}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")

    def _start(self) -> None:
        f = self.folder
        munged = ["munged", "--foreground", "--force", f"--key-file={f}/munge.key", f"--socket={f}/munge.socket"]
        munged += [f"--log-file={f}/munged.log", f"--pid-file={f}/munged.pid", f"--seed-file={f}/munge.seed"]
        self._daemon(CONTROLLER, *munged)
        self._until(lambda: (f / "munge.socket").exists(), "munged")
        self._daemon(CONTROLLER, "slurmctld", "-D", "-f", f"{f}/slurm.conf")
        for name in self._nodes():
            self._daemon(name, "slurmd", "-D", "-f", f"{f}/slurm.conf")
        self._until(self._all_idle, "the nodes")

    def _daemon(self, machine: str, *command: str) -> None:
        with (self.folder / f"{command[0]}-{machine}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    self.machines[machine].command(*command),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                )
            )

    def _all_idle(self) -> bool:
        try:
            states = self.client("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T").split()
        except subprocess.CalledProcessError:
            return False
        return states == ["idle"] * self.node_count

    def _until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self.daemons):
                raise RuntimeError(f"{what} did not come up\n{self.logs()}")
            time.sleep(0.05)

    def client(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a Slurm command on the controller's machine; its stdout."""
        done = subprocess.run(
            self.machines[CONTROLLER].command(*command, mount=False),
            check=True,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**self.environment, **environment},
            timeout=PATIENCE_S,
        )
        return done.stdout

    def bring_back(self, node: str) -> None:
        """One that was set down. It may have come back by itself (ReturnToService=2), and is refused then."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.client("scontrol", "update", f"nodename={node}", "state=resume")

    def submit(self, root: Path, *arguments: str, **environment: str) -> Job:
        """sbatch from `root`, its log in the cluster's folder."""
        log = self.folder / f"job-{time.monotonic_ns()}.log"
        line = self.client("sbatch", "--parsable", f"--output={log}", *arguments, cwd=root, **environment)
        return Job(self, int(line), log)

    def submit_stage(self, root: Path, stage: str, *words: str, **environment: str) -> Job:
        """slurm/submit.sh from `root`; jobs that submit themselves again have one log each."""
        log = self.folder / "job-%j.log"
        line = ["bash", "slurm/submit.sh", stage, "--parsable", f"--output={log}", *words]
        number = int(self.client(*line, cwd=root, **environment))
        return self.job(number)

    def job(self, number: int) -> Job:
        """One that submit_stage submitted, or a successor of it."""
        return Job(self, number, self.folder / f"job-{number}.log")

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        for daemon in self.daemons:  # nsenter, which ends as its daemon was taken along; killed, it leaves a zombie
            daemon.wait(PATIENCE_S)
