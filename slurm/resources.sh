# How many ranks a node has, and CPUs a rank. Sourced by launch.sh.

# by_hand: in an allocation made by salloc, where no batch script runs that could be started again.
by_hand() { [[ ! ${SLURM_JOB_ID:-} || $(scontrol show job --oneliner "$(this_job)") == *" BatchFlag=0 "* ]]; }

# One per GPU if there are GPUs (the same number on every node), else what was requested from sbatch.
tasks_per_node() {
    local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}} # salloc sets only the second, maybe as a100:8
    if ((${gpus##*:} > 0)); then
        echo "${gpus##*:}"
    elif [[ $SLURM_TASKS_PER_NODE == *,* ]]; then
        complain "the nodes have unequal numbers of tasks ($SLURM_TASKS_PER_NODE): use --ntasks-per-node."
    else
        echo "${SLURM_TASKS_PER_NODE%%(*}"
    fi
}

cpus_per_task() {
    local tasks=$1 there=${SLURM_CPUS_ON_NODE:-${SLURM_JOB_CPUS_PER_NODE%%[(,]*}} cpus
    cpus=${SLURM_CPUS_PER_TASK:-$((there / tasks))}
    if ((cpus < 1 || cpus * tasks > there)); then
        complain "$tasks tasks a node (one per GPU) don't fit on the $there CPUs that were requested:" \
            "add --ntasks-per-node=$tasks --cpus-per-task=N, or --exclusive."
    else
        echo "$cpus"
    fi
}
