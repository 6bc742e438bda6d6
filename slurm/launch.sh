# Sourced by the .sbatch files beside it, in the batch shell: one process per rank with srun, a warning passed on to
# them, and the job put back into the queue when they ask for it. It knows no site; what to edit is in the .sbatch.
#
# From the environment of sbatch, where the defaults don't do:
#   PYTHON         the interpreter; else .venv/bin/python of the folder submitted from, else python3
#   MAX_RESTARTS   how often a job puts itself back into the queue (20)

source slurm/forward.sh
readonly START_ME_AGAIN=75 # what a process leaves with when it was told to stop and has saved; train/preemption.py

# launch <script.py> [overrides...]: never returns.
launch() {
    local nodes=$SLURM_JOB_NUM_NODES tasks cpus code
    tasks=$(tasks_per_node) || exit 2
    cpus=$(cpus_per_task "$tasks") || exit 2
    export PYTHON=${PYTHON:-$(default_python)} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ports that systems hand out by themselves
    # Rank 0 runs on the first node of the list, as this shell does: they share its local disk.
    AGAIN_NOTE=$(mktemp)
    trap 'rm -f "$AGAIN_NOTE"' EXIT
    export MASTER_ADDR MASTER_PORT AGAIN_NOTE START_ME_AGAIN
    echo "job $SLURM_JOB_ID: $nodes node(s) x $tasks task(s) x $cpus cpu(s), rendezvous $MASTER_ADDR:$MASTER_PORT," \
        "restart ${SLURM_RESTART_COUNT:-0}: $PYTHON $*"
    forwarding "USR1:USR1" srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$cpus" --distribution=block --kill-on-bad-exit=1 bash slurm/task.sh "$@"
    code=$?
    if ((code == 0)) && [[ -s $AGAIN_NOTE ]]; then
        requeue
    elif ((code != 0)) && [[ ${USR1_came:-} ]]; then
        requeue # warned while they were still starting, they died of it: the last checkpoint is there to go on from
    fi
    exit "$code"
}

default_python() {
    local ours=$PWD/.venv/bin/python
    if [[ -x $ours ]]; then echo "$ours"; else command -v python3; fi
}

# One per GPU where there are GPUs (the same number on every node), else what sbatch was asked for.
tasks_per_node() {
    if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
        echo "$SLURM_GPUS_ON_NODE"
    elif [[ $SLURM_TASKS_PER_NODE == *,* ]]; then
        complain "the nodes have unequal numbers of tasks ($SLURM_TASKS_PER_NODE): use --ntasks-per-node."
    else
        echo "${SLURM_TASKS_PER_NODE%%(*}"
    fi
}

cpus_per_task() {
    local tasks=$1 cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / $1))}
    if ((cpus < 1 || cpus * tasks > SLURM_CPUS_ON_NODE)); then
        complain "$tasks tasks a node (one per GPU) don't fit on the $SLURM_CPUS_ON_NODE CPUs that were asked for:" \
            "add --ntasks-per-node=$tasks --cpus-per-task=N, or --exclusive."
    else
        echo "$cpus"
    fi
}

# Asked for by the processes, or after a warning. scancel does not end here: its TERM ends this shell.
requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} limit=${MAX_RESTARTS:-20}
    if ((restarts >= limit)); then
        complain "stopped after $restarts restarts (MAX_RESTARTS=$limit):" \
            "submit the same line again to go on."
    else
        # Said first: Slurm may end this shell before the next line.
        echo "job $SLURM_JOB_ID: back into the queue (restart $((restarts + 1)) of at most $limit)"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        complain "Slurm did not take the job back: submit the same line again to go on."
    fi
    exit "$START_ME_AGAIN"
}

complain() {
    echo "error: $*" >&2
    return 2
}
