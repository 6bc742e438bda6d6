# Sourced by the .sbatch files beside it, in the batch shell: srun starts one process per rank, a warning is passed on
# to them, and the job is started again when they ask for it. Settings that depend on the site are in site.sh.
#
# From the environment of sbatch, if the defaults don't fit:
#   SITE           another file in place of slurm/site.sh
#   PYTHON         the interpreter; default: .venv/bin/python of the submission folder, else python3
#   REQUEUE        how a job is started again: requeue, self or no (site.sh)
#   MAX_RESTARTS   how often, for any reason (20)
#   MAX_CRASHES    how often in a row after a crash without a new checkpoint or finished shard (3)

source slurm/forward.sh
source slurm/resources.sh
source slurm/restarts.sh
# Exit codes of processes (docs/operations.md): stopped on request and saved; a mistake of the user's; damaged data.
readonly START_ME_AGAIN=75 USER_ERROR=2 DATA_ERROR=3

# launch [--alone] <script.py> [overrides...]: never returns. --alone: one process, on one node.
launch() {
    local nodes=$SLURM_JOB_NUM_NODES tasks cpus code alone="" signals="USR1:USR1"
    [[ $1 != --alone ]] || { alone=yes && shift; }
    if [[ $alone ]] && ((nodes > 1)); then
        complain "$1 runs as one process: use --nodes=1."
        exit 2
    fi
    prepare || exit 2
    if [[ $alone ]]; then tasks=1; else tasks=$(tasks_per_node) || exit 2; fi
    cpus=$(cpus_per_task "$tasks") || exit 2
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ephemeral ports
    export MASTER_ADDR MASTER_PORT
    if by_hand; then
        signals+=" INT:USR1" # Ctrl-C: save and leave
    else
        trap 'hopeless=yes interrupted=1' USR2 # sent by task.sh on other nodes
        [[ $REQUEUE != self ]] || trap 'submit_if_preempted; interrupted=1' TERM # interrupted: of forwarding
    fi
    echo "job $SLURM_JOB_ID: $nodes node(s) x $tasks task(s) x $cpus cpu(s), rendezvous $MASTER_ADDR:$MASTER_PORT," \
        "restart $(restarts): $PYTHON $*"
    forwarding "$signals" srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" \
        --cpus-per-task="$cpus" --distribution=block --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
        bash slurm/task.sh "$@"
    code=$?
    finish "$code" "$@"
}

# prepare: read the site's file, and make ready what all ranks inherit; false after a sentence if that fails.
prepare() {
    if [[ ! -f ${SITE:=slurm/site.sh} ]]; then
        complain "SITE=$SITE is not there: it is the file with your site's options."
        return
    fi
    # shellcheck source=slurm/site.sh
    source "$SITE"
    refuse_wrong_policy || return
    if ! prepare_job; then
        complain "prepare_job of $SITE failed: see above, and mend it there."
        return
    fi
    export SITE PYTHON=${PYTHON:-$(default_python)}
    # Rank 0 writes it, maybe on another machine than this shell's.
    by_hand || rm -f ".slurm/note-$SLURM_JOB_ID-"* # of a start that was killed
    mkdir -p .slurm && NOTE=$(mktemp ".slurm/note-$SLURM_JOB_ID-XXXX") || return
    trap 'rm -f "$NOTE"' EXIT
    export NOTE START_ME_AGAIN USER_ERROR DATA_ERROR
}

# finish <code of srun> <script.py> [overrides...]: end the job, as done or failed, or start it again; never returns.
finish() {
    local code=$1 said
    shift
    said=$(<"$NOTE")
    ((code == 0)) || sleep 2 # a signal of task.sh may still be on its way
    if [[ ${successor:-} ]]; then
        exit "$START_ME_AGAIN" # preempted: submitted again already
    elif ((code == 0)) && [[ $said == "$START_ME_AGAIN" ]]; then
        start_again "asked to be started again"
    elif ((code == 0)); then
        rm -f "$(crash_note)"
    elif [[ $said == "$USER_ERROR" || $said == "$DATA_ERROR" || ${hopeless:-} ]]; then
        ((code == USER_ERROR)) || code=${said:-$DATA_ERROR}
        complain "ended with code $code: the message is above, and starting it again would not fix it."
    elif [[ ${USR1_came:-} || ${INT_came:-} ]]; then
        start_again "warned while still starting" # the warning ended them: continue from the last checkpoint
    elif crashes_without_progress "$@"; then
        start_again "a rank failed"
    fi
    exit "$code"
}

default_python() {
    local ours=$PWD/.venv/bin/python
    if [[ ${CONTAINER[*]:-} ]]; then
        echo python3 # the container's
    elif [[ -x $ours ]]; then
        echo "$ours"
    else
        command -v python3
    fi
}
