# Whether and how a job is started again. Sourced by launch.sh.

# How often it was started again: by Slurm under this number, and by itself under earlier ones.
restarts() { echo $((${SLURM_RESTART_COUNT:-0} + ${CHAIN_RESTARTS:-0})); }

refuse_wrong_policy() {
    if [[ $REQUEUE != requeue && $REQUEUE != self && $REQUEUE != no ]]; then
        complain "REQUEUE=$REQUEUE must be requeue, self or no (slurm/site.sh)."
    elif [[ $REQUEUE == self && ! ${SUBMITTED:-} ]] && ! by_hand; then
        complain "REQUEUE=self needs the line that this job was submitted by: submit it by" \
            "bash slurm/submit.sh ${SLURM_JOB_NAME:-STAGE} ... in place of sbatch, and without --export=NONE."
    fi
}

# start_again <why>: never returns. A cancelled job does not get here, or is no longer running.
start_again() {
    local limit=${MAX_RESTARTS:-20}
    if by_hand || [[ $REQUEUE == no ]]; then
        echo "job $SLURM_JOB_ID: $1; submit the same line again to continue"
    elif (($(restarts) >= limit)); then
        complain "stopped after $(restarts) restarts (MAX_RESTARTS=$limit):" \
            "submit the same line again to continue."
    elif [[ $(scontrol show job --oneliner "$(this_job)") == *" JobState=RUNNING "* ]]; then # not cancelled in the meantime
        if [[ $REQUEUE == self ]]; then
            submit_successor "$1" && exit 0 # 0: what waits for an array waits for this task to succeed
        else
            # Print first: Slurm may end this shell before the next line.
            echo "job $SLURM_JOB_ID: $1; back into the queue (restart $(($(restarts) + 1)) of at most $limit)"
            scontrol requeue "$(this_job)" && exit 0
        fi
        complain "Slurm could not requeue the job: submit the same line again to continue."
    fi
    exit "$START_ME_AGAIN"
}

# By TERM, which the batch shell gets when its job is ended: cancelled, or preempted without time to save, or after it.
submit_if_preempted() {
    local facts limit=${MAX_RESTARTS:-20}
    facts=$(scontrol show job --oneliner "$(this_job)")
    [[ $facts == *" PreemptTime="* && $facts != *" PreemptTime=None "* ]] || return
    if ((! ${successor:-0} && $(restarts) < limit)); then submit_successor "preempted"; fi
}

# submit_successor <why>: submit the job's own line again, to start when this job has ended. Sets successor.
submit_successor() {
    local name words inherited=() more
    more="--parsable --dependency=afterany:$SLURM_JOB_ID${SLURM_ARRAY_TASK_ID:+ --array=$SLURM_ARRAY_TASK_ID}"
    eval "words=($SUBMITTED)" # of submit.sh, quoted by it
    for name in $(compgen -e SLURM_); do [[ $name == SLURM_CONF ]] || inherited+=(-u "$name"); done
    successor=$(env "${inherited[@]}" SUBMIT_MORE="$more" CHAIN_JOB="$(chain)" CHAIN_RESTARTS=$(($(restarts) + 1)) \
        bash slurm/submit.sh "${words[@]}") || return
    successor=${successor%%;*} # a federation adds its cluster
    echo "job $SLURM_JOB_ID: $1; goes on as job $successor (restart $(($(restarts) + 1)) of at most ${MAX_RESTARTS:-20})"
    hand_over_waiting
}

# Jobs that wait for this one wait for its successor instead; for a task of an array, also for it. One task at a time:
# two that change what a job waits for at once would lose one of the changes.
hand_over_waiting() {
    local job needs lock
    exec {lock}>>.slurm/hand-over.lock && flock --exclusive --timeout 60 "$lock"
    while read -r job needs; do
        needs=$(sed -E 's/\([a-z]*\)|_\*//g' <<<"$needs") # afterok:7_*(unfulfilled): of an array
        if [[ $job == "$successor" ]]; then
            continue
        elif [[ ${SLURM_ARRAY_JOB_ID:-} && $needs =~ ([a-z]+):${SLURM_ARRAY_JOB_ID}(,|$) ]]; then
            needs+=,${BASH_REMATCH[1]}:$successor
        elif [[ ! ${SLURM_ARRAY_JOB_ID:-} && $needs =~ :$SLURM_JOB_ID(,|$) ]]; then
            needs=$(sed -E "s/:$SLURM_JOB_ID(,|$)/:$successor\1/g" <<<"$needs")
        else
            continue
        fi
        scontrol update "JobId=$job" "Dependency=$needs"
    done < <(squeue --noheader --user="$UID" --states=PENDING --format='%i %E')
    exec {lock}>&-
}

# crashes_without_progress <script.py> [overrides...]: count this crash; false after too many in a row.
crashes_without_progress() {
    local before count=0 now limit=${MAX_CRASHES:-3} note
    note=$(crash_note)
    now=$(progress_of "$@")
    if [[ -f $note ]]; then
        { read -r count; read -r before; } <"$note"
        [[ $before == "$now" ]] || count=0
    fi
    ((++count))
    if ((count >= limit)); then
        rm -f "$note"
        complain "crashed $count times in a row without getting further than $now (MAX_CRASHES=$limit):" \
            "see the messages above; submit the same line again to continue."
        return 1
    fi
    mkdir -p "${note%/*}" && printf '%s\n' "$count" "$now" >"$note"
}

# The number under which it began.
chain() { echo "${CHAIN_JOB:-$SLURM_JOB_ID}"; }

# This job's file, in the submission folder, which exists on every node that it may run on.
crash_note() { echo ".slurm/crashes-$(chain)"; }

# progress_of <script.py> [overrides...]: the newest checkpoint below output=, else the number of finished shards.
progress_of() {
    local argument output
    for argument in "$@"; do
        [[ $argument == output=* ]] && output=${argument#output=}
    done
    if [[ -f ${output:-}/checkpoints/latest ]]; then
        echo "$(<"$output/checkpoints/latest")"
    else
        echo "$(find "${output:-/nowhere}" -name '*.done.json' 2>/dev/null | wc -l) finished shards"
    fi
}
