#!/usr/bin/env bash
# A command on all hosts of a Cloud TPU, one slice or several: gets the TPU, brings the code, starts the command, and
# brings all of it back after a preemption.
#
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE --type=v6e-16 [flags] [-- COMMAND...]
#
#   up        asks for the TPU (a queued resource of that name) and waits until it is there
#   run       brings the code to the hosts of a TPU that is there, sets them up, starts COMMAND on each; it needs this
#             machine no more
#   babysit   up, run, and then watches until COMMAND has ended: asks for the TPU again when it was taken away, starts
#             COMMAND again when a host has lost it. Can be ended and started at any time: takes up where things stand
#   status    of the TPU and of COMMAND on each host
#   logs      of one host, as they come: --slice=0 --worker=0
#   stop      TERM to COMMAND on all hosts, so that it saves; waits for their ends. The TPU stays, and bills
#   down      deletes the TPU, when asked for that again; --yes: at once
#
#   --project=P             else that of gcloud
#   --slices=1              how many such TPUs, which train together
#   --tier=on-demand        or spot (cheap, may be taken away at any time), or reserved
#   --runtime=IMAGE         else the one for that type
#   --valid_until=6h        gives up if there is no capacity until then, else waits for ever; s, m, h or d
#   --create_flag=FLAG      for `gcloud compute tpus queued-resources create`, as --create_flag=--network=N; repeatable
#   --ssh_flag=FLAG         for `gcloud compute tpus tpu-vm ssh` and scp, as --ssh_flag=--internal-ip; repeatable
#   --git=URL --ref=COMMIT  the code is cloned on the hosts; else it is the HEAD of this repository, sent as an archive
#   --env_file=FILE         NAME=VALUE lines for COMMAND (secrets, mode 600); copied to ~/llm_jax_run/env of the hosts
#   --mount=BUCKET=DIR      mounts a bucket on the hosts, for data; repeatable
#   --restarts=10           crashes in a row after which a host gives up; see run_host.sh
#   --down_when_done        babysit deletes the TPU when COMMAND has ended with 0
#   --dry_run               prints what would be run, and runs nothing
#
# Exit codes: 0 done; 75 COMMAND was stopped and has saved; 70 the TPU cannot be had, or COMMAND crashed without a code;
# 78 a mistake in the flags or in the config; 130 Ctrl-C; else that of COMMAND.
# LLM_JAX_POLL_SECONDS=30 between two looks.
set -euo pipefail

script=${0##*/}

say() { printf '%s: %s\n' "$script" "$*" >&2; }
die() { # CODE MESSAGE
    local code=$1
    shift
    say "$*"
    exit "$code"
}

# ---- the flags -------------------------------------------------------------------------------------------------------
case ${1-} in
    up | run | babysit | status | logs | stop | down) verb=$1 ;;
    --help | -h) sed -n '2,/^set /{s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
    *) die 78 "'${1-}' is no verb; it is up, run, babysit, status, logs, stop or down: see --help" ;;
esac
shift

name='' zone='' type='' project='' slices=1 tier=on-demand runtime='' valid_until='' git='' ref='' env_file=''
restarts=10 slice=0 worker=0 yes='' down_when_done='' dry_run='' poll=${LLM_JAX_POLL_SECONDS:-30}
create_flags=() ssh_flags=() mounts=() command=()
while (($#)); do
    case $1 in
        --name=* | --zone=* | --type=* | --project=* | --slices=* | --tier=* | --runtime=* | --valid_until=* | \
            --git=* | --ref=* | --env_file=* | --restarts=* | --slice=* | --worker=*)
            flag=${1%%=*}
            printf -v "${flag#--}" %s "${1#*=}"
            ;;
        --create_flag=-?*) create_flags+=("${1#*=}") ;;
        --ssh_flag=-?*) ssh_flags+=("${1#*=}") ;;
        --mount=?*=/?*) mounts+=("$1") ;;
        --mount=*) die 78 "$1 must be --mount=BUCKET=DIR, with an absolute DIR" ;;
        --yes) yes=1 ;;
        --down_when_done) down_when_done=1 ;;
        --dry_run | --dry-run) dry_run=1 ;;
        --help | -h) exec "$0" --help ;;
        --) shift && command=("$@") && break ;;
        *) die 78 "$1 is no flag of this; see --help, write --name=VALUE, and put -- before the command" ;;
    esac
    shift
done

# Chips and hosts: cloud.google.com/tpu/docs/ v2, v3, v4, v5p, v5e, v6e. The number in a type counts TensorCores, two to
# a chip, up to v5p; chips in v5e and v6e. Images: cloud.google.com/tpu/docs/runtimes
known='v2-{8,32,128,256,512}, v3-{8,32,64,...,2048}, v4-{8,16,...,8192}, v5p-{8,16,...,12288}, '
known+='v5litepod-{1,4,8,16,32,64,128,256}, v6e-{1,4,8,16,32,64,128,256}'
chips='' hosts='' image=''
describe_type() {
    local size=${type##*-} cores=1 each=4 # chips of a host
    case $type in
        tpu7x* | v7*)
            die 78 "--type=$type: to use TPU7x, you must use Google Kubernetes Engine" \
                "(https://docs.cloud.google.com/tpu/docs/tpu7x); see launch/gke/"
            ;;
        v2-8 | v2-32 | v2-128 | v2-256 | v2-512) cores=2 image=tpu-ubuntu2204-base ;;
        v3-8 | v3-32 | v3-64 | v3-128 | v3-256 | v3-512 | v3-1024 | v3-2048) cores=2 image=tpu-ubuntu2204-base ;;
        v5litepod-1 | v5litepod-4 | v5litepod-8) image=v2-alpha-tpuv5-lite each=$size ;;
        v5litepod-16 | v5litepod-32 | v5litepod-64 | v5litepod-128 | v5litepod-256) image=v2-alpha-tpuv5-lite ;;
        v6e-1 | v6e-4 | v6e-8) image=v2-alpha-tpuv6e each=$size ;;
        v6e-16 | v6e-32 | v6e-64 | v6e-128 | v6e-256) image=v2-alpha-tpuv6e ;;
        v4-* | v5p-*)
            local most=12288 its=v2-alpha-tpuv5
            [[ $type != v4-* ]] || most=8192 its=tpu-ubuntu2204-base
            [[ ! $size =~ ^[1-9][0-9]{0,4}$ ]] || ((size % 8 || size > most)) || cores=2 image=$its
            ;;
    esac
    [[ $type ]] || die 78 "--type is missing; give one of $known"
    [[ $image ]] || die 78 "--type='$type' is not known; known are $known"
    chips=$((size / cores)) hosts=$((size / cores / each))
    image=${runtime:-$image}
}

number() { [[ $2 =~ ^[0-9]{1,6}$ ]] || die 78 "$1=$2 must be a number, 0 or more"; }
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    die 78 "--name='$name' must be a name for the TPU: lower case letters, digits and -, a letter first"
[[ $zone ]] || die 78 "--zone is missing; give the zone of the TPU, as --zone=us-east5-b"
number --restarts "$restarts" && number --slice "$slice" && number --worker "$worker" && number --slices "$slices"
((slices > 0)) || die 78 "--slices=$slices must be 1 or more"
((slice < slices)) || die 78 "--slice=$slice must be less than --slices=$slices"
case $tier in
    on-demand) price='on-demand: full price, until it is deleted' ;;
    spot) price='spot: cheap, and may be taken away at any time' ;;
    reserved) price='reserved: paid for by your reservation' ;;
    *) die 78 "--tier=$tier must be on-demand, spot or reserved" ;;
esac
valid_seconds=''
if [[ $valid_until ]]; then
    [[ $valid_until =~ ^([1-9][0-9]{0,5})([smhd])$ ]] ||
        die 78 "--valid_until=$valid_until must be a number with s, m, h or d, as --valid_until=6h"
    case ${BASH_REMATCH[2]} in s) unit=1 ;; m) unit=60 ;; h) unit=3600 ;; d) unit=86400 ;; esac
    valid_seconds=$((BASH_REMATCH[1] * unit))
fi
case $verb in
    up | run | babysit)
        describe_type
        say "$name: $type x $slices: $((chips * slices)) chips on $((hosts * slices)) hosts" \
            "($((chips / hosts)) each), $price; $zone, image $image"
        ;;
esac

check_command() {
    ((${#command[@]})) || die 78 "no command; give it after --"
    local i workdir
    for ((i = 0; i < ${#command[@]}; i++)); do
        case ${command[i]} in
            --workdir=*) workdir=${command[i]#*=} ;;
            --workdir) workdir=${command[i + 1]-} ;;
            *) continue ;;
        esac
        [[ $workdir == gs://?* || $workdir == /?* ]] ||
            die 78 "--workdir=$workdir would be another folder on each host, and gone with the TPU; give" \
                "gs://BUCKET/DIR, or the absolute path of a file system that all hosts have mounted"
    done
    if [[ $git ]]; then
        [[ ! $git =~ ^[a-z]+://[^/]*:[^/]*@ && ! $git =~ ^https?://[^/]*@ ]] ||
            die 78 "--git has a password in it, which would stand in lists of processes and in logs; leave --git" \
                "out, so that the code is sent from here"
        [[ $ref =~ ^[0-9a-f]{40}$ ]] ||
            die 78 "--ref='$ref' must be a commit, all 40 digits, so that every start has the same code; see" \
                "git rev-parse"
    elif [[ $ref ]]; then
        die 78 "--ref=$ref belongs to --git=URL; leave it out, or give that, too"
    fi
    if [[ $env_file ]]; then
        [[ -f $env_file ]] || die 78 "--env_file=$env_file is no file; see that it exists"
        [[ $(find -L "$env_file" -perm 600) ]] ||
            die 78 "--env_file=$env_file holds secrets, so it must have mode 600; chmod 600 $env_file"
    fi
}
case $verb in run | babysit) check_command ;; esac
[[ ! $down_when_done || $verb == babysit ]] || die 78 "--down_when_done is for babysit, which sees the end"
command -v gcloud >/dev/null || [[ $dry_run ]] ||
    die 78 "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

# ---- what Google is asked --------------------------------------------------------------------------------------------
# Nothing here may ask back, since nobody may be there to answer: --quiet.
where=(--zone="$zone" --quiet)
[[ ! $project ]] || where+=(--project="$project")
these="--name=$name --zone=$zone${project:+ --project=$project}"
((slices == 1)) || these+=" --slices=$slices"

tmp=$(mktemp -d)
children=()
left='nothing was begun' # what there is when this is ended from outside
billing="the TPU $name bills until it is deleted: $0 down $these"
waiting="$name is asked for, and will bill from when it is there until it is deleted: $0 down $these"
# shellcheck disable=SC2317 # called by the trap
interrupted() {
    trap '' INT TERM HUP
    local group
    for group in ${children[@]+"${children[@]}"}; do kill -- "-$group" 2>/dev/null || true; done
    say "ended by a signal: $left"
    exit 130
}
trap 'rm -rf "$tmp"' EXIT
trap interrupted INT TERM HUP

quoted() { # for one shell, any shell
    local quote="'" escaped="'\\''"
    if [[ $1 =~ ^[A-Za-z0-9_./:=@,%+-]+$ ]]; then printf %s "$1"; else printf "'%s'" "${1//$quote/$escaped}"; fi
}
google() { # gcloud, or the line that would call it
    local word
    if [[ ! $dry_run ]]; then
        gcloud compute tpus "$@" </dev/null
        return
    fi
    printf 'gcloud compute tpus'
    for word in "$@"; do printf ' %s' "$(quoted "$word")"; done
    printf '\n'
}
node() { if ((slices == 1)); then echo "$name"; else echo "$name-$1"; fi; }
spawn() { # in a process group of its own, so that all of it can be ended
    set -m
    "$@" &
    children+=($!)
    set +m
}
pause() { # a trap is run at once during `wait`, but after the end of anything else
    spawn sleep "$poll"
    wait "${children[0]}" || true
    children=()
}

# state: one of Google's (CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE SUSPENDING SUSPENDED FAILED
# DELETING); NONE only if Google says that there is no such thing; DENIED; UNKNOWN if it cannot be told. why: its words
state='' why=''
look() {
    local out
    why=''
    if [[ $dry_run ]]; then
        google queued-resources describe "$name" "${where[@]}" "$STATE_FORMAT"
    elif out=$(google queued-resources describe "$name" "${where[@]}" "$STATE_FORMAT" 2>"$tmp/describe"); then
        out=${out%%$'\n'*}
        state=${out%%|*} why=${out#*|}
        [[ $state ]] || state=UNKNOWN
    elif grep -q "NOT_FOUND.*queuedResources/$name'" "$tmp/describe"; then
        state=NONE
    else
        why=$(said describe) state=UNKNOWN
        ! grep -qE "$DENIED" "$tmp/describe" || state=DENIED
    fi
}
readonly STATE_FORMAT='--format=value[separator="|"](state.state,state.failedData.error.message)'
readonly DENIED='PERMISSION_DENIED|UNAUTHENTICATED|SERVICE_DISABLED|gcloud auth|invalid_grant|\[project\]'
said() { grep -v '^ *$' "$tmp/$1" | head -n 3 | cut -c1-400 | paste -s -d ' ' -; }
told=''
tell() { # once, until it is something else
    [[ $1 == "$told" ]] || say "$(date -u +%H:%M:%S) $1"
    told=$1
}

asked='' # for a TPU, by this, and there is none yet
attempts=0 # to ask for it, of which nothing was heard
create() {
    local flags=(--accelerator-type="$type" --runtime-version="$image")
    if ((slices == 1)); then flags+=(--node-id="$name"); else flags+=(--node-count="$slices" --node-prefix="$name"); fi
    case $tier in spot | reserved) flags+=(--"$tier") ;; esac
    [[ ! $valid_until ]] || flags+=(--valid-until-duration="$valid_until")
    flags+=(${create_flags[@]+"${create_flags[@]}"})
    left=$waiting
    if [[ $dry_run ]]; then
        google queued-resources create "$name" "${where[@]}" "${flags[@]}"
    elif google queued-resources create "$name" "${where[@]}" "${flags[@]}" >"$tmp/create" 2>&1; then
        asked=1 attempts=0
        tell "asked for $name"
    elif grep -qE 'RESOURCE_EXHAUSTED|[Qq]uota' "$tmp/create"; then
        die 70 "there is no quota for it: $(said create)"
    elif grep -qE "$DENIED|INVALID_ARGUMENT|FAILED_PRECONDITION|NOT_FOUND|unrecog|Invalid value" "$tmp/create"; then
        die 78 "Google does not take it: $(said create)"
    elif ! grep -q ALREADY_EXISTS "$tmp/create"; then # the request may have come through all the same: look again
        ((++attempts < 10)) || die 70 "it cannot be asked for: $(said create)"
        tell "cannot tell whether it was asked for: $(said create)"
    fi
}
remove() { # until it is gone. dead: only as long as nobody has asked for it anew
    local tries=0
    while [[ $state != NONE ]]; do
        case $state in
            SUSPENDED | FAILED | ACTIVE | CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING)
                [[ ${1-} != dead || $state == SUSPENDED || $state == FAILED ]] || return 0
                ((++tries <= 5)) || die 70 "$name cannot be deleted: $(said delete); try again: $0 down $these"
                tell "deletes $name ($state)"
                google queued-resources delete "$name" "${where[@]}" --force >"$tmp/delete" 2>&1 ||
                    tell "delete: $(said delete)"
                ;;
            *) tell "waits until $name is deleted ($state${why:+: $why})" ;;
        esac
        look
        [[ $state == NONE ]] || { pause && look; } # what is deleted was seen to be dead just before
    done
    asked=''
}
give_up() {
    if [[ $asked ]]; then
        remove
        die 70 "gave up: $1; $name, which this had asked for, is deleted"
    fi
    die 70 "gave up: $1; $name was there before this, so it is left: $0 down $these"
}
up() {
    local began=$SECONDS first=1
    if [[ $dry_run ]]; then
        look && create
        return
    fi
    while :; do
        look
        case $state in
            ACTIVE)
                tell "$name is there${first:+ already, of the type and tier it was asked for with}"
                left=$billing asked=''
                return
                ;;
            NONE) create && began=$SECONDS ;;
            FAILED | SUSPENDED)
                [[ $state == SUSPENDED || ! $asked ]] || give_up "Google could not provide it${why:+: $why}"
                remove dead
                continue
                ;;
            DENIED)
                [[ ! $first ]] || die 78 "Google does not let you see $name: $why"
                tell "cannot see $name: $why"
                ;;
            UNKNOWN) tell "cannot see $name, and so does nothing: $why" ;;
            CREATING | ACCEPTED | WAITING_FOR_RESOURCES)
                left=$waiting
                tell "$name is not there yet ($state)"
                [[ ! $valid_until ]] || ((SECONDS - began < valid_seconds)) || give_up "no capacity in $valid_until"
                ;;
            *) left=$waiting && tell "$name is not there yet ($state)" ;;
        esac
        first=''
        pause
    done
}

# ---- what runs on the hosts ------------------------------------------------------------------------------------------
# host_* are sent to them. They may be run twice, since gcloud repeats what breaks off.
host_state() { # sets state: absent, running, lost (it was started, and neither runs nor has ended), or the exit code
    local dir=~/llm_jax_run
    state=absent
    if [[ -e $dir/lock ]] && ! flock -n "$dir/lock" true; then
        state=running
    elif [[ -e $dir/exit ]]; then
        state=$(cat "$dir/exit")
    elif tmux has-session -t =llm_jax 2>/dev/null; then
        state=running
    elif [[ -e $dir/started ]]; then
        state=lost
    fi
}
host_look() { # $1: who watches from now on, unless somebody else does; $2: or does no more
    local dir=~/llm_jax_run state stopped='' commit='' sum='' watcher='' line=''
    host_state
    if [[ $state != absent ]]; then
        commit=$(cat ~/llm_jax/COMMIT 2>/dev/null || echo unknown)
        sum=$(cksum <"$dir/start")
        line=$(tail -c 2000 "$dir/log" 2>/dev/null | tail -n 1 | tr -d '\000-\010\013-\037' | cut -c1-200) || true
    fi
    [[ ! -e $dir/stopped ]] || stopped=stopped
    if [[ $1 && -d $dir ]]; then
        watcher=$(find "$dir/watcher" -mmin -5 -exec cat {} + 2>/dev/null) || true
        if [[ ! $watcher || $watcher == "$1" || $watcher == "$2" ]]; then
            echo "$1" >"$dir/watcher"
            watcher=''
        fi
    fi
    printf 'LLM_JAX|%s|%s|%s|%s|%s|%s|%s\n' \
        "$(hostname)" "$state" "$stopped" "$commit" "$sum" "$watcher" "$line"
}
host_deliver() { # $1: commit; $2: URL to clone, or ""; $3: 1 if secrets were sent; then flags of setup_vm.sh
    local new=~/llm_jax_new dir=~/llm_jax_run code=~/llm_jax commit=$1 url=$2 secrets=$3 state ready
    shift 3
    host_state
    if [[ $state == running ]]; then
        rm -rf "$new"
        printf 'LLM_JAX|READY %s\n' "$(cat "$code/COMMIT")"
        return
    fi
    mkdir -p "$dir" && chmod 700 "$dir"
    if [[ $(cat "$code/COMMIT" 2>/dev/null) != "$commit" ]]; then
        rm -rf "$code.new"
        if [[ $url ]]; then
            GIT_TERMINAL_PROMPT=0 git clone --quiet --no-checkout "$url" "$code.new"
            git -C "$code.new" checkout --quiet "$commit"
            echo "$commit" >"$code.new/COMMIT"
        else
            mkdir "$code.new" && tar -xzf "$new/code.tar.gz" -C "$code.new"
        fi
        rm -rf "$code.old"
        [[ ! -e $code ]] || mv "$code" "$code.old"
        mv "$code.new" "$code"
    fi
    if [[ -e $new/start ]]; then
        rm -f "$dir/exit" "$dir/stopped" "$dir/started" "$dir/env" # of the command before
        [[ ! $secrets ]] || install -m 600 "$new/env" "$dir/env"
        mv "$new/start" "$dir/start"
    fi
    rm -rf "$new"
    ready=$(bash "$code/launch/setup_vm.sh" --extra=tpu "$@" | tee /dev/stderr | tail -n 1)
    printf 'LLM_JAX|%s\n' "$ready"
}
host_start() {
    local dir=~/llm_jax_run state
    host_state
    [[ $state != running ]] || return 0
    rm -f "$dir/exit" "$dir/stopped"
    : >"$dir/started"
    tmux new-session -d -s llm_jax bash "$dir/start"
}
host_stop() { # TERM to run_host.sh, which is among those that hold its lock; to all of them if it has died
    local dir=~/llm_jax_run state pid holders runners=''
    host_state
    [[ $state == running ]] || return 0
    : >"$dir/stopped"
    holders=$(find /proc/[0-9]*/fd -lname "$(cd "$dir" && pwd -P)/lock" 2>/dev/null | cut -d/ -f3 | sort -un) || true
    for pid in $holders; do
        ! grep -qz 'run_host\.sh$' "/proc/$pid/cmdline" 2>/dev/null || runners+=" $pid"
    done
    # shellcheck disable=SC2086 # numbers
    kill -TERM ${runners:-$holders} 2>/dev/null || true
}
host_tail() { tail -n "$1" ~/llm_jax_run/log; }

on_host() { # the command that runs one of them: on_host FUNCTION ARGUMENTS...
    local words
    words=$(printf ' %q' "$@")
    printf 'bash -c %s' "$(quoted "set -euo pipefail
$(declare -f host_state "$1")
${words:1}")"
}
# Keeps what Google's networks drop from hanging for hours.
readonly ALIVE=(-oConnectTimeout=30 -oServerAliveInterval=15 -oServerAliveCountMax=8)
at() { # SLICE WORKER COMMAND
    google tpu-vm ssh "$(node "$1")" "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} "${ALIVE[@]/#/--ssh-flag=}" \
        --worker="$2" --command="$3"
}
copy() { # SLICE FOLDER
    google tpu-vm scp "$2" "$(node "$1"):" "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} "${ALIVE[@]/#/--scp-flag=}" \
        --worker=all --recurse
}
everywhere() { # FUNCTION ARGUMENTS...: for all slices at once, each with its number as first argument; output in $tmp
    local i pid code=0 what=$1
    shift
    if [[ $dry_run ]]; then
        for ((i = 0; i < slices; i++)); do "$what" "$i" "$@"; done
        return
    fi
    children=()
    for ((i = 0; i < slices; i++)); do
        spawn "$what" "$i" "$@" >"$tmp/out.$i" 2>"$tmp/err.$i"
    done
    for pid in "${children[@]}"; do wait "$pid" || code=$?; done
    children=()
    : >"$tmp/lines"
    : >"$tmp/errors"
    for ((i = 0; i < slices; i++)); do
        sed -n "s/^LLM_JAX|/$i|/p" "$tmp/out.$i" >>"$tmp/lines"
        grep -vE '^Using s.* batch size|Attempting to connect' "$tmp/err.$i" >>"$tmp/errors" || true
    done
    return "$code"
}
on_all() { everywhere at all "$(on_host "$@")"; }

look_at_hosts() { # a line for each in $tmp/hosts: SLICE|HOST|STATE|stopped|COMMIT|SUM|WATCHER|LAST LINE
    on_all host_look "$@" || return
    [[ $dry_run ]] || sort -t'|' -k1,1n -k2,2 -o "$tmp/hosts" "$tmp/lines"
}
in_state() { awk -F'|' -v state="$1" '$3 ~ "^(" state ")$"' "$tmp/hosts"; } # a regular expression
first() { in_state "$1" | head -n 1 | cut -d'|' -f"$2"; }
show_hosts() {
    local i host state _ commit line
    while IFS='|' read -r i host state _ commit _ _ line; do
        case $state in
            absent) line='nothing was started' ;;
            lost) line="neither runs nor has ended (a restart of the host?); commit ${commit:0:12}: $line" ;;
            running) line="commit ${commit:0:12}: $line" ;;
            *) state="ended with $state" line="commit ${commit:0:12}: $line" ;;
        esac
        printf '%s worker %s: %s; %s\n' "$(node "$i")" "${host##*-w-}" "$state" "$line"
    done <"$tmp/hosts"
}

# ---- the code and the command ----------------------------------------------------------------------------------------
commit=$ref sum=''
prepare() { # what is sent, in $tmp/llm_jax_new; the same for every start, whatever happens here meanwhile
    local new=$tmp/llm_jax_new root
    mkdir -m 700 "$new"
    # shellcheck disable=SC2016 # for the host
    printf 'cd ~/llm_jax && exec launch/run_host.sh --restarts=%d%s --%s\n' "$restarts" \
        "${env_file:+ --env_file=\"\$HOME/llm_jax_run/env\"}" "$(printf ' %q' "${command[@]}")" >"$new/start"
    sum=$(cksum <"$new/start")
    if [[ ! $git ]]; then
        root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel 2>/dev/null) ||
            die 78 "$(dirname "$0") lies in no git repository, so the code has no name; give --git=URL --ref=COMMIT"
        local changed
        changed=$(git -C "$root" status --porcelain)
        [[ ! $changed ]] || die 78 "$root has changes that are not committed, and what runs must have a name;" \
            "commit them, or git stash -u; secrets belong outside of it: ${changed%%$'\n'*}"
        commit=$(git -C "$root" rev-parse HEAD)
        echo "$commit" >"$tmp/COMMIT"
        git -C "$root" archive --format=tar -o "$new/code.tar" HEAD
        tar -rf "$new/code.tar" -C "$tmp" COMMIT
        gzip "$new/code.tar"
    fi
    [[ ! $env_file ]] || install -m 600 "$env_file" "$new/env"
}
retried() {
    local try code
    for try in 1 2 3; do
        "$@" && return
        code=$?
        [[ $code != 78 ]] || break
        ((try < 3)) || break
        tell "tries again: $(said errors)"
        pause
    done
    return "$code"
}
failures=0 # of launch, in a row
launch() { # 1 if it cannot be done now
    local code=0
    ((++failures <= 5)) || die 70 "$name cannot be set up: $(said errors); $billing"
    bring_and_start || code=$?
    [[ $code != 78 ]] || die 78 "$name cannot be set up: $(said errors); $billing"
    ((code)) || failures=0
    return "$code"
}
bring_and_start() {
    local ready all=$((hosts * slices))
    if [[ $dry_run ]]; then
        sed 's/^/# llm_jax_new\/start: /' "$tmp/llm_jax_new/start"
    else
        tell "brings commit ${commit:0:12} to $all hosts, and sets them up"
    fi
    retried everywhere copy "$tmp/llm_jax_new" || cannot "bring the code to the hosts" || return
    retried on_all host_deliver "$commit" "$git" "${env_file:+1}" ${mounts[@]+"${mounts[@]}"} ||
        cannot "set up the hosts" || return
    if [[ ! $dry_run ]]; then
        ready=$(grep -cE "^[0-9]+\|READY $commit$" "$tmp/lines") || true
        [[ $ready == "$all" ]] || cannot "start: $ready of $all hosts are READY with $commit ($(said lines))" || return
    fi
    left="the command may have been started on some hosts: $0 status $these; $billing"
    retried on_all host_start || cannot "start the command on all hosts" || return
    look_at_hosts '' '' || cannot "see whether it runs" || return
    [[ ! $dry_run ]] || return 0
    ! in_state running | cut -d'|' -f6 | grep -qvxF "$sum" ||
        die 78 "another command was started on $name meanwhile; see $0 status $these"
    left="the command goes on: $0 status $these, and stop; $billing"
    tell "started on $all hosts"
}
cannot() {
    local code=$?
    tell "cannot $1: $(said errors)"
    ((code)) || code=1
    return "$code"
}
stop_all() {
    while :; do
        if on_all host_stop && look_at_hosts '' ''; then
            [[ ! $dry_run && $(in_state running) ]] || return 0
            tell "waits until the command has ended on all hosts"
        else
            tell "cannot reach all hosts: $(said errors)"
        fi
        pause
    done
}
require_active() {
    look
    [[ $dry_run || $state == ACTIVE ]] && return
    case $state in
        NONE) die 70 "there is no $name in $zone; ask for it: $script up" ;;
        UNKNOWN | DENIED) die 70 "cannot see $name: $why" ;;
        *) die 70 "$name is not there ($state${why:+: $why}); wait for it: $script up" ;;
    esac
}
require_hosts() {
    look_at_hosts '' '' || die 70 "cannot reach all hosts of $name (is it --slices=$slices?): $(said errors)"
}

end() { # CODE: of the command, on the host of which the log is shown
    local line
    line=$(in_state "$1" | head -n 1)
    IFS='|' read -r slice worker _ <<<"$line"
    say "the last lines of $(node "$slice") worker ${worker##*-w-}:"
    at "$slice" "$(number_of "$worker")" "$(on_host host_tail 20)" >&2 2>/dev/null || true
    if [[ $(in_state running) ]]; then
        tell "stops the other hosts"
        stop_all
    fi
    die "$1" "the command ended with $1; $billing"
}
number_of() { [[ $1 =~ -w-([0-9]+)$ ]] && echo "${BASH_REMATCH[1]}" || echo 0; }

# ---- the verbs -------------------------------------------------------------------------------------------------------
run() {
    prepare
    require_active
    left="nothing was started; $billing"
    require_hosts
    if [[ ! $dry_run && $(in_state running) ]]; then
        show_hosts >&2
        die 78 "a command is running on $name; wait for its end, or end it: $0 stop $these"
    fi
    launch || exit 70
    [[ $dry_run ]] || show_hosts
    [[ $dry_run ]] || say "it needs this machine no more; see $0 status $these, and logs, stop; $billing"
}

me="$(whoami)@$(hostname) pid $$"
readonly CRASH='[1-9]|[1-68-9][0-9]|7[0-46-9]|[1-9][0-9][0-9]' # all codes but 0 and 75
babysit() {
    local now heals=0 healed=0 unseen=0 crash='' active='' first_look=1 other='' watcher pid
    prepare
    up
    if [[ $dry_run ]]; then
        look_at_hosts "$me" '' && launch
        return
    fi
    while :; do
        look
        case $state in
            ACTIVE) active=1 ;;
            UNKNOWN | DENIED)
                tell "cannot see $name, and so does nothing: $why"
                pause
                continue
                ;;
            *)
                [[ ! $active || ! $state =~ ^(NONE|DELETING)$ ]] || # a preemption is SUSPENDING and SUSPENDED
                    die 70 "$name was deleted by somebody, and so is not asked for again; start this anew for that"
                tell "$name was taken away ($state)"
                active='' crash='' failures=0
                up
                continue
                ;;
        esac
        if ! look_at_hosts "$me" "$other"; then
            # A node may be gone before its queued resource is seen to be.
            if grep -q 'terminal state' "$tmp/errors"; then unseen=$((unseen + 1)); else unseen=0; fi
            tell "cannot reach the hosts: $(said errors)"
            if ((unseen >= 3)); then
                unseen=0 active=''
                remove
                up
            fi
            pause
            continue
        fi
        unseen=0
        watcher=$(cut -d'|' -f7 "$tmp/hosts" | grep -m 1 . || true)
        if [[ $watcher ]]; then
            pid=${watcher##* }
            if [[ ! $other && ${watcher% pid *} == "${me% pid *}" ]] && ! kill -0 "$pid" 2>/dev/null; then
                other=$watcher # it ended without a word
                continue
            fi
            die 78 "$name is being watched by $watcher; end that one first (it is forgotten after 5 minutes)"
        fi
        if [[ $first_look ]]; then
            first_look=''
            if [[ $(in_state running) ]]; then
                left="the command goes on: $0 status $these, and stop; $billing"
                [[ $(first running 6) == "$sum" ]] ||
                    die 78 "another command (or this with another --restarts or --env_file) is running on $name; wait for its end, or end it: $0 stop $these"
                [[ $(first running 5) == "$commit" ]] ||
                    tell "WARNING: it runs with commit $(first running 5), and would come back with $commit"
                tell 'it runs already; watches it'
            elif [[ $(in_state 0) && ! $(in_state '[^0].*') && $(first 0 5) == "$commit" &&
                $(first 0 6) == "$sum" ]]; then
                break
            else
                launch || { first_look=1 && pause; }
                continue
            fi
        fi
        now=$(date +%s)
        if [[ $(in_state 78) ]]; then
            end 78
        elif grep -q '|stopped|' "$tmp/hosts"; then
            if [[ ! $(in_state running) ]]; then
                show_hosts >&2
                die 75 "the command was stopped by $script stop; $billing"
            fi
            tell "is being stopped by $script stop"
        elif [[ $(in_state "$CRASH") ]]; then
            # Hosts that are being taken away end like this, too: it must still be so at the next look.
            [[ ! $crash ]] || end "$(first "$CRASH" 3)"
            crash=1
            pause
            continue
        elif [[ ! $(in_state '[^0].*') ]]; then
            break
        elif [[ $(in_state 'lost|absent|75') ]]; then
            if [[ $(in_state 'lost|75') ]]; then
                if ((now - healed < 3600)); then heals=$((heals + 1)); else heals=1; fi
                healed=$now
                ((heals <= 10)) || die 70 "the hosts have lost the command 10 times within an hour each; $billing"
                tell "lost by $(in_state 'lost|75' | wc -l | tr -d ' ') hosts; starts it again there"
            fi
            launch || true
        else
            tell "runs on $(in_state running | wc -l | tr -d ' ') hosts"
        fi
        crash=''
        pause
    done
    show_hosts
    if [[ $down_when_done ]]; then
        remove
        say "done; $name is deleted"
    else
        say "done; $billing"
    fi
}

case $verb in
    up)
        up
        say "$billing"
        ;;
    run) run ;;
    babysit) babysit ;;
    status)
        look
        [[ $state != NONE ]] || { echo "there is no $name in $zone" && exit 0; }
        case $state in UNKNOWN | DENIED) die 70 "cannot see $name: $why" ;; esac
        [[ $dry_run ]] || echo "$name: $state${why:+: $why}"
        [[ $dry_run || $state == ACTIVE ]] || exit 0
        require_hosts
        [[ $dry_run ]] || show_hosts
        ;;
    logs)
        left="the command goes on"
        [[ $dry_run ]] || require_active
        at "$slice" "$worker" 'tail -n 100 -F llm_jax_run/log' ||
            die 70 "cannot read it; is it --slices=$slices, --slice=$slice and --worker=$worker?"
        ;;
    stop)
        require_active
        require_hosts
        left="TERM was sent, at least to some hosts: see $0 status $these; $billing"
        stop_all
        [[ $dry_run ]] || show_hosts
        say "$billing"
        ;;
    down)
        look
        case $state in
            NONE) die 0 "there is no $name in $zone" ;;
            UNKNOWN | DENIED) die 70 "cannot see $name, and so does nothing: $why" ;;
            ACTIVE)
                if look_at_hosts '' '' && [[ $(in_state running) ]]; then
                    say "a command is running on it, and would be killed without a save; first: $0 stop $these"
                fi
                ;;
        esac
        say "deletes $name and the disks of its hosts: code, logs, all that lies there. What is on gs:// or on a" \
            "shared file system is kept"
        if [[ ! $dry_run && ! $yes ]]; then
            [[ -t 0 ]] || die 78 "nobody is there to be asked; give --yes"
            read -r -p "delete it? Type its name: " answer
            [[ $answer == "$name" ]] || die 78 "nothing was deleted"
        fi
        if [[ $dry_run ]]; then
            google queued-resources delete "$name" "${where[@]}" --force
        else
            left="$name may be half deleted: $0 status $these"
            remove
            say "$name is deleted"
        fi
        ;;
esac
