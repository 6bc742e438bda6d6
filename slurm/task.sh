# What srun starts for every rank: task.sh <script.py> [overrides...]. Sets torchrun's variables from Slurm's.
source slurm/forward.sh
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# A site may show each task only its own GPU, which then has number 0.
[[ ${CUDA_VISIBLE_DEVICES:-,} == *,* ]] || LOCAL_RANK=0
export PATH=${PYTHON%/*}:$PATH # for tools installed beside the interpreter, such as ninja

# The warning reaches only the program, as TERM: USR1 itself is ignored by it and by its children.
forwarding "USR1:TERM TERM:TERM" "$PYTHON" "$@"
code=$?
if ((code == START_ME_AGAIN || code == USER_ERROR || code == DATA_ERROR)); then
    # The batch shell must learn the code; srun reports only the highest code of all ranks, including those it kills for
    # this one. Rank 0 runs beside the batch shell, the others reach it through Slurm; the sleep gives the signal time
    # to arrive.
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
