# Sourced by the .sbatch files beside it, in the batch shell: srun starts one process per rank, a warning is passed on
# to them, and the job is requeued when they ask for it. Settings that depend on the site are in the .sbatch.
#
# From the environment of sbatch, if the defaults don't fit:
#   PYTHON         the interpreter; default: .venv/bin/python of the submission folder, else python3
#   MAX_RESTARTS   how often a job requeues itself, for any reason (20)
#   MAX_CRASHES    how often in a row it does so after a crash without a new checkpoint or finished shard (3)

source slurm/forward.sh
source slurm/restarts.sh
# Exit codes of processes (docs/operations.md): stopped on request and saved; a mistake of the user's; damaged data.
readonly START_ME_AGAIN=75 USER_ERROR=2 DATA_ERROR=3

# launch [--alone] <script.py> [overrides...]: never returns. --alone: one process, on one node.
launch() {
    local nodes=$SLURM_JOB_NUM_NODES tasks cpus code
    if [[ $1 == --alone ]]; then
        shift
        if ((nodes > 1)); then
            complain "$1 runs as one process: use --nodes=1."
            exit 2
        fi
        tasks=1
    else
        tasks=$(tasks_per_node) || exit 2
    fi
    cpus=$(cpus_per_task "$tasks") || exit 2
    export PYTHON=${PYTHON:-$(default_python)} OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ephemeral ports
    # Rank 0 runs on the first node of the list, like this shell: they share its local disk.
    NOTE=$(mktemp)
    trap 'rm -f "$NOTE"' EXIT
    trap 'hopeless=yes interrupted=1' USR2 # sent by task.sh on other nodes
    export MASTER_ADDR MASTER_PORT NOTE START_ME_AGAIN USER_ERROR DATA_ERROR
    echo "job $SLURM_JOB_ID: $nodes node(s) x $tasks task(s) x $cpus cpu(s), rendezvous $MASTER_ADDR:$MASTER_PORT," \
        "restart ${SLURM_RESTART_COUNT:-0}: $PYTHON $*"
    forwarding "USR1:USR1" srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$cpus" --distribution=block --kill-on-bad-exit=1 bash slurm/task.sh "$@"
    code=$?
    finish "$code" "$@"
}

# finish <code of srun> <script.py> [overrides...]: end the job, as done or failed, or requeue it; never returns.
finish() {
    local code=$1 said
    shift
    said=$(<"$NOTE")
    ((code == 0)) || sleep 2 # a signal of task.sh may still be on its way
    if ((code == 0)) && [[ $said == "$START_ME_AGAIN" ]]; then
        requeue "asked to be started again"
    elif ((code == 0)); then
        rm -f "$(crash_note)"
    elif [[ $said == "$USER_ERROR" || $said == "$DATA_ERROR" || ${hopeless:-} ]]; then
        ((code == USER_ERROR)) || code=${said:-$DATA_ERROR}
        complain "ended with code $code: the message is above, and starting it again would not fix it."
    elif [[ ${USR1_came:-} ]]; then
        requeue "warned of the time limit while still starting" # the warning ended them: continue from the last checkpoint
    elif crashes_without_progress "$@"; then
        requeue "a rank failed"
    fi
    exit "$code"
}

default_python() {
    local ours=$PWD/.venv/bin/python
    if [[ -x $ours ]]; then echo "$ours"; else command -v python3; fi
}

# One per GPU if there are GPUs (the same number on every node), else what was requested from sbatch.
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
        complain "$tasks tasks a node (one per GPU) don't fit on the $SLURM_CPUS_ON_NODE CPUs that were requested:" \
            "add --ntasks-per-node=$tasks --cpus-per-task=N, or --exclusive."
    else
        echo "$cpus"
    fi
}

complain() {
    echo "error: $*" >&2
    return 2
}
