#!/usr/bin/env bash
# Submit a stage with the options of your site (slurm/site.sh). From the root of the repository:
#
#   bash slurm/submit.sh train_ldm --nodes=2 --gpus-per-node=8 --exclusive input=LATENTS output=RUN engine=zero2
#
# A stage is the name of a .sbatch file here. Words with -- go to sbatch, and take precedence over slurm/site.sh; the
# others go to the stage's script. The job knows the line, so it can submit itself again (REQUEUE=self).
set -u

refuse() {
    echo "error: $*" >&2
    exit 2
}

if [[ " $* " == *" --help "* ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
[[ -f slurm/launch.sh ]] || refuse "start it from the root of the repository: bash slurm/submit.sh STAGE ..."
stages=$(cd slurm && echo *.sbatch)
stage=${1:-}
[[ $stage && " $stages " == *" $stage.sbatch "* ]] || refuse "name a stage first: ${stages//.sbatch/}; --help shows an example."
shift
for_sbatch=() for_script=()
for word in "$@"; do
    case $word in
    --*) for_sbatch+=("$word") ;;
    -*) refuse "$word: write options of sbatch out, as --partition=gpu for -p gpu." ;;
    *) for_script+=("$word") ;;
    esac
done
[[ -f ${SITE:=slurm/site.sh} ]] || refuse "SITE=$SITE is not there: it is the file with your site's options."
# shellcheck source=slurm/site.sh
source "$SITE"

# Set by a job that submits itself again (restarts.sh): options to add, and the first job of the chain.
read -r -a more <<<"${SUBMIT_MORE:-}"
[[ ${SUBMIT_MORE:-} ]] || unset CHAIN_JOB CHAIN_RESTARTS
unset SUBMIT_MORE
SUBMITTED=$(printf '%q ' "$stage" "$@")
export SITE REQUEUE SUBMITTED
exec sbatch "${for_sbatch[@]}" "${more[@]}" "slurm/$stage.sbatch" "${for_script[@]}"
