#!/usr/bin/env bash
# Sets up the host it runs on for the code it lies in: as often as you like, what is there already is left alone.
#
#   launch/setup_vm.sh [flags]
#     --extra=NAMES       what to install with it, by setup.py: tpu or cuda, or several: tpu,build
#     --venv=DIR          the virtual environment: LLM_JAX_VENV, else ~/llm_jax_venv, where launch/run_host.sh looks
#     --mount=BUCKET=DIR  a gs:// bucket to be seen at DIR, by gcsfuse; for data (checkpoints go to gs:// directly);
#                         may be given several times
#     --dry_run           say what would be run, and run nothing
#
# Takes Python 3.11 to 3.13 of this host, else lets uv fetch one; installs once for each setup.py and --extra; makes an
# environment anew whose making was interrupted; removes a lock of TPUs that nobody uses; tries again what a network
# may fail at. The one line on standard output is the last thing it does: READY and the commit of the code.
set -euo pipefail
exec 3>&1 >&2 </dev/null

die() { # the exit code is 78
    printf 'setup_vm.sh: %s\n' "$*" >&2
    exit 78
}
extra='' venv=${LLM_JAX_VENV:-$HOME/llm_jax_venv} mounts=() dry_run=''
while (($#)); do
    case $1 in
        --extra=*) extra=${1#*=} ;;
        --venv=?*) venv=${1#*=} ;;
        --mount=?*=/?*) mounts+=("${1#*=}") ;;
        --mount=*) die "$1 must be --mount=BUCKET=DIR, with an absolute DIR" ;;
        --dry_run | --dry-run) dry_run=1 ;;
        --help | -h)
            sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" >&3
            exit 0
            ;;
        *) die "$1 is no flag of this; see --help" ;;
    esac
    shift
done
code_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
IFS=, read -ra names <<<"$extra"
for name in "${names[@]}"; do
    grep -qF " \"$name\": " "$code_dir/setup.py" ||
        die "--extra=$extra: setup.py has no extra '$name'; tpu, cuda, or none"
done
commit=$(cat "$code_dir/COMMIT" 2>/dev/null ||
    git -C "$code_dir" describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)

run() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@" >&3
        echo >&3
    else
        "$@"
    fi
}
as_root() {
    if [[ $(id -u) == 0 ]]; then run "$@"; else run sudo -n "$@"; fi
}
retry() {
    local pause
    [[ $dry_run ]] && run "$@" && return
    for pause in 5 10 20 40; do
        "$@" && return
        echo "setup_vm.sh: '$*' failed; once more in $pause s"
        sleep "$pause"
    done
    "$@" && return
    echo "setup_vm.sh: '$*' failed 5 times, see above; once that is mended, the same command goes on from here"
    exit 1
}

# ---- accelerators
lock=${LLM_JAX_TPU_LOCK:-/tmp/libtpu_lockfile} devices=${LLM_JAX_DEVICES:-/dev} # tests have others
holders() { # of other users, too, where that is allowed
    local find=(find /proc/[0-9]*/fd "(" -lname "$devices/accel*" -o -lname "$devices/vfio/*" ")" -print)
    if [[ $(id -u) != 0 ]] && sudo -n true 2>/dev/null; then find=(sudo -n "${find[@]}"); fi
    { "${find[@]}" 2>/dev/null || true; } | cut -d/ -f3 | sort -un | xargs
}
if [[ -e $lock ]]; then
    used_by=$(holders)
    if [[ $used_by ]]; then
        echo "setup_vm.sh: TPUs are in use by process $used_by: $lock stays"
    elif [[ -O $lock ]]; then
        run rm -f "$lock"
    else
        as_root rm -f "$lock" ||
            die "$lock is another user's, left over by a program that has ended; remove it: sudo rm $lock"
    fi
fi

# ---- the virtual environment
find_python() {
    local python
    for python in python3.12 python3.11 python3.13; do
        if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}
make_venv() {
    local python uv
    [[ -e $venv ]] && run rm -rf "$venv"
    python=$(find_python)
    if [[ $python ]]; then
        run "$python" -m venv "$venv"
        return
    fi
    uv=$(PATH=$PATH:$HOME/.local/bin command -v uv) || {
        # https://docs.astral.sh/uv/getting-started/installation/
        retry bash -o pipefail -c 'python3 -m pip install --user --quiet uv ||
            curl -LsSf https://astral.sh/uv/install.sh | UV_NO_MODIFY_PATH=1 sh'
        uv=$HOME/.local/bin/uv
    }
    retry "$uv" venv --seed --python=3.12 "$venv"
}
if [[ -e $venv && ! -e $venv/pyvenv.cfg && ! -e $venv.lock && $(ls -A "$venv") ]]; then
    die "--venv=$venv is there, and no virtual environment; give another"
fi
if [[ ! $dry_run ]]; then
    mkdir -p "$(dirname "$venv")"
    exec 9>>"$venv.lock"
    flock 9 # another host may have the same home, and another terminal this one
fi
stamp=$venv/llm_jax_installed
wanted="$code_dir [$extra] $(sha256sum <"$code_dir/setup.py")"
if [[ ! -x $venv/bin/python || ! -e $stamp || $(cat "$stamp") != "$wanted" ]]; then
    [[ -x $venv/bin/python && -e $stamp ]] || make_venv
    run rm -f "$stamp"
    retry "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar=off \
        -e "$code_dir${extra:+[$extra]}"
    run "$venv/bin/llm-jax" --version
    [[ $dry_run ]] || echo "$wanted" >"$stamp"
fi
[[ $dry_run ]] || exec 9>&-

# ---- buckets
gcsfuse_manual=https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt codename
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    as_root curl -fsSL -o "$key" "$url/doc/apt-key.gpg" &&
        as_root sh -c "echo 'deb [signed-by=$key] $url gcsfuse-$codename main' >/etc/apt/sources.list.d/gcsfuse.list" &&
        as_root apt-get -o DPkg::Lock::Timeout=600 update &&
        as_root apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse
}
for mount in "${mounts[@]}"; do
    bucket=${mount%%=*} folder=${mount#*=}
    bucket=${bucket#gs://}
    bucket=${bucket%/}
    [[ $bucket == */* ]] && die "--mount=$mount: $bucket is more than a bucket; mount that, and use the folder in it"
    mounted=$(findmnt -rno SOURCE --mountpoint "$folder") || mounted=''
    [[ $mounted == "$bucket" ]] && ls "$folder" >/dev/null 2>&1 && continue
    [[ $mounted && $mounted != "$bucket" ]] && die "--mount=$mount: $mounted is mounted there; give another folder"
    [[ $mounted ]] && run fusermount -uz "$folder" # what mounted it has died
    if ! command -v gcsfuse >/dev/null; then
        if [[ $(id -u) != 0 ]] && ! sudo -n true 2>/dev/null; then
            die "--mount=$mount needs gcsfuse, and root to install it: $gcsfuse_manual"
        fi
        if [[ $dry_run ]]; then install_gcsfuse; else retry install_gcsfuse; fi
    fi
    run mkdir -p "$folder" 2>/dev/null || as_root install -d -o "$(id -u)" "$folder" ||
        die "--mount=$mount: $folder cannot be made; give a folder of yours"
    retry gcsfuse --implicit-dirs "$bucket" "$folder"
done

[[ $dry_run ]] || echo "READY $commit" >&3
