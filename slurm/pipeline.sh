#!/usr/bin/env bash
# The whole chain on Slurm: one job per stage, each waiting for those it needs. From the root of the repository:
#
#   bash slurm/pipeline.sh output=runs/birds --partition=gpu --account=project \
#       make_shards source=folder input=my_pictures size=256 \
#       train_autoencoder --nodes=2 --gpus-per-node=8 --exclusive autoencoder=kl_f8 \
#       train_clip --gpus-per-node=8 --exclusive \
#       precompute_latents --array=0-7 --gpus=1 \
#       train_ldm --nodes=4 --gpus-per-node=8 --exclusive engine=zero2 \
#       evaluate_ldm --gpus=1 guidance.scale=3
#
# A stage's name begins its own arguments: words with -- go to sbatch, the others to its script. Before the first name
# come arguments for all stages (to sbatch), and
#   output=FOLDER        holds everything: shards autoencoder clip latents ldm
#   shards=FOLDER        existing image-text shards: make_shards is skipped;
#   autoencoder=FOLDER   an existing run: train_autoencoder is skipped;
#   clip=FOLDER          likewise for train_clip.
# All stages run, named or not. When one fails for good, Slurm cancels those that wait for it; submitting the same line
# again continues where they stopped.
set -u

readonly STAGES="make_shards train_autoencoder train_clip precompute_latents train_ldm evaluate_ldm"
declare -a for_sbatch_all=()
declare -A place=() ids=()
for stage in $STAGES; do declare -a "for_sbatch_$stage=()" "for_script_$stage=()"; done

refuse() {
    echo "error: $*" >&2
    exit 2
}

# read_arguments <words...>: assign them to the stages.
read_arguments() {
    local stage="" word
    for word in "$@"; do
        if [[ " $STAGES " == *" $word "* ]]; then
            stage=$word
        elif [[ $word == --* ]]; then
            local -n for_sbatch="for_sbatch_${stage:-all}"
            for_sbatch+=("$word")
        elif [[ $word == -* ]]; then
            refuse "$word: use the long form of sbatch's options, such as --partition=gpu for -p gpu."
        elif [[ $stage ]]; then
            local -n for_script="for_script_$stage"
            for_script+=("$word")
        elif [[ $word =~ ^(output|shards|autoencoder|clip)=(.+)$ ]]; then
            place[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
        else
            refuse "$word belongs to no stage: put it after a stage's name ($STAGES); --help shows an example."
        fi
    done
    [[ ${place[output]:-} ]] || refuse "output= must be given: the folder for all results."
}

# submit <stage> <stages to wait for> <overrides...>: submit a job, unless its output already exists.
submit() {
    local stage=$1 needed after="" id
    local -n for_sbatch="for_sbatch_$stage" for_script="for_script_$stage"
    for needed in $2; do after+=${ids[$needed]:+:${ids[$needed]}}; done
    shift 2
    id=$(sbatch --parsable ${after:+--dependency=afterok$after --kill-on-invalid-dep=yes} "${for_sbatch_all[@]}" \
        "${for_sbatch[@]}" "slurm/$stage.sbatch" "$@" "${for_script[@]}") || give_up "$stage"
    ids[$stage]=${id%%;*} # a federation appends the cluster's name
    echo "$stage ${ids[$stage]}${after:+ after ${after#:}}"
}

# give_up <stage>: an incomplete chain is useless.
give_up() {
    ((${#ids[@]})) && scancel "${ids[@]}"
    refuse "sbatch refused $1 (its message is above); the jobs submitted before it were cancelled."
}

if [[ " $* " == *" --help "* ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
fi
[[ -f slurm/launch.sh ]] || refuse "start this script from the root of the repository: bash slurm/pipeline.sh output=FOLDER ..."
read_arguments "$@"
output=${place[output]}
shards=${place[shards]:-$output/shards}
autoencoder=${place[autoencoder]:-$output/autoencoder}
clip=${place[clip]:-$output/clip}
encoders=("autoencoder.path=$autoencoder" "clip.path=$clip")

[[ ${place[shards]:-} ]] || submit make_shards "" "output=$shards"
[[ ${place[autoencoder]:-} ]] || submit train_autoencoder make_shards "input=$shards" "output=$autoencoder"
[[ ${place[clip]:-} ]] || submit train_clip make_shards "input=$shards" "output=$clip"
submit precompute_latents "make_shards train_autoencoder train_clip" "input=$shards" "output=$output/latents" \
    "${encoders[@]}"
submit train_ldm precompute_latents "input=$output/latents" "output=$output/ldm" "${encoders[@]}"
submit evaluate_ldm train_ldm "input=$output/ldm" "shards=$shards"
