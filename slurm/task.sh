# What srun starts for every rank: task.sh <script.py> [overrides...]. Sets torchrun's variables from Slurm's.
source slurm/forward.sh
source slurm/local_disk.sh
# shellcheck source=slurm/site.sh
source "${SITE:=slurm/site.sh}"
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# A site may show each task only its own GPU, which then has number 0.
[[ ${CUDA_VISIBLE_DEVICES:-,} == *,* ]] || LOCAL_RANK=0
[[ $PYTHON != */* ]] || export PATH=${PYTHON%/*}:$PATH # for tools installed beside the interpreter, such as ninja
code=$USER_ERROR
if enter_job_folder; then
    if [[ ${LOGS:-} ]]; then
        mkdir -p "$LOGS/$(this_job)" && log_to "$LOGS/$(this_job)/rank-$RANK.log"
    fi
    # The warning reaches only the program, as TERM: USR1 itself is ignored by it and by its children.
    forwarding "USR1:TERM TERM:TERM" "${CONTAINER[@]}" "$PYTHON" "$@"
    code=$?
    [[ ${copiers:-} ]] && log_no_more
    leave_job_folder
fi
if ((code == START_ME_AGAIN || code == USER_ERROR || code == DATA_ERROR)); then
    # The batch shell must learn the code; srun reports only the highest code of all ranks, including those it kills for
    # this one. Rank 0 leaves a note, the others reach it through Slurm; the sleep gives the signal time to arrive.
    if ((RANK == 0)); then
        echo "$code" >"$NOTE"
    elif ((code != START_ME_AGAIN)); then
        scancel --batch --signal=USR2 "$(this_job)" && sleep 1
    fi
fi
# All ranks agreed to stop and have saved, so none may look like a failure, for which srun would stop the others while
# they still close their logs.
((code == START_ME_AGAIN)) && exit 0
exit "$code"
