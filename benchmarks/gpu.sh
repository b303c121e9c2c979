#!/usr/bin/env bash
# Everything worth measuring on one H100 or H200, in one sitting: first whether attention by cuDNN is right there,
# forward and backward, then training at three sizes with one thing changed at a time.
#
# Usage:  benchmarks/gpu.sh [--out=DIR] [--minutes=25] [--only=REGEX] [--tiny]
#
# DIR (default: gpu-results) gets results.jsonl, a line for each measurement, and the log and all figures of each.
# The same command goes on where the time was up, or something stopped it: what has a line is not measured again, so
# delete a line to repeat one. Ends with a table. Exit code 1: attention is wrong, and nothing was timed.
#
# --tiny goes through it with a model of no size, on a CPU too, to test this script.
#
# Autotuning results are kept in DIR for the measurements after, so the compile times are those of a warm cache but for
# the first of each size. Unknown names in XLA_FLAGS abort a process; tests/test_gpu_sh.py tries those below.
set -euo pipefail

cd "$(dirname "$0")/.."
out=gpu-results minutes=25 only=. tiny=false
for argument in "$@"; do
  case $argument in
    --out=*) out=${argument#*=} ;;
    --minutes=*) minutes=${argument#*=} ;;
    --only=*) only=${argument#*=} ;;
    --tiny) tiny=true ;;
    *)
      echo "gpu.sh: $argument: no such flag; see the head of $0" >&2
      exit 78
      ;;
  esac
done

readonly WORTH_STARTING=40 # seconds; less is left for nothing
deadline=$((SECONDS + 60 * minutes))
mkdir -p "$out/autotune"
out=$(realpath "$out")
results=$out/results.jsonl
touch "$results"
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# As `llm-jax` sets it. And a cache of autotuning results of our own, as benchmarks/train.py throws its cache away.
if [[ -z ${XLA_CLIENT_MEM_FRACTION-}${XLA_PYTHON_CLIENT_MEM_FRACTION-} ]]; then
  export XLA_CLIENT_MEM_FRACTION=0.9
fi
export JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=none
flags="${XLA_FLAGS-} --xla_gpu_per_fusion_autotune_cache_dir=$out/autotune"

gigabytes=0
if command -v nvidia-smi >/dev/null; then
  gigabytes=$(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1) / 1024))
elif ! $tiny; then
  echo "gpu.sh: no nvidia-smi, so no NVIDIA GPU; --tiny tests this script without one" >&2
  exit 78
fi

# measure NAME SECONDS SETTING COMMAND...: runs the command, with --json, and with the flag of XLA or the environment
# variable that SETTING is.
measure() {
  local name=$1 limit=$2 setting=$3 environment=("XLA_FLAGS=$flags") left code=0
  case $setting in
    --*) environment=("XLA_FLAGS=$flags $setting") ;;
    ?*) environment+=("$setting") ;;
  esac
  shift 3
  if [[ ! $name =~ $only ]] || grep -q "^{\"name\": \"$name\"," "$results"; then
    return
  fi
  left=$((deadline - SECONDS))
  if ((left < WORTH_STARTING)); then
    echo "$name: not measured, the $minutes minutes are over; the same command goes on"
    return
  fi
  echo "$name ..."
  env "${environment[@]}" timeout --kill-after=10 $((left < limit ? left : limit)) \
    "$@" --json="$out/$name.json" >"$out/$name.log" 2>&1 || code=$?
  # Cut off by the end of the sitting: to be tried again in the next one.
  if ((code == 124 && left < limit)); then
    echo "$name: not finished in time; the same command tries again"
    return
  fi
  "$python" benchmarks/gpu_results.py add "$results" "$name" "$code" "$out/$name.json" "$out/$name.log"
}

attention() { # NAME DOCUMENTS FLAGS...
  local name=$1 documents=$2
  shift 2
  if $tiny; then
    set -- "${tiny_model[@]}"
  fi
  measure "attention-$name" 150 "" "$python" benchmarks/kernels.py --only=attention --repetitions=5 \
    --documents="$documents" "$@"
}

training() { # NAME SETTING FLAGS...
  local name=$1 setting=$2
  shift 2
  if $tiny; then
    set -- "${tiny_model[@]}"
  fi
  measure "$name" 200 "$setting" "$python" benchmarks/train.py --steps="$steps" "$@"
}

steps=10
tiny_model=(
  --config=benchmarks/configs/tiny.py --config.model.num_layers=1 --config.model.width=32 --config.model.num_heads=2
  --config.tokenizer.vocab_size=512 --config.train.sequence_length=32 --config.train.batch_size=2
)
if $tiny; then
  steps=2
  if [[ $only == . ]]; then
    only='^(attention-124m|124m|124m-triton|8b)$'
  fi
fi

gpt=(--config=configs/gpt2_124m.py --config.train.batch_size=64 --config.train.microbatches=1)
# The 1.3B of Llama's shape that published figures are of, at the length of theirs.
llama=(
  --config=configs/llama_1b.py --config.model.num_layers=24 --config.model.num_heads=16 --config.model.num_kv_heads=16
  --config.model.head_width=128 --config.model.feed_forward_width=5632 --config.model.tie_embeddings=false
  --config.tokenizer.vocab_size=50304 --config.train.sequence_length=1024 --config.train.batch_size=32
  --config.model.remat=none --config.train.microbatches=1 --config.train.loss_chunk=none
)
large=(
  --config=configs/llama_8b.py --config.train.sequence_length=4096 --config.train.batch_size=2 --config.model.remat=full
  --config.optimizer.moment_dtype=bfloat16 --config.train.loss_chunk=none
)

# Right? Documents as in text, one, more than the kernel has room for; grouped heads, a window, wide heads.
attention 124m 4 "${gpt[@]}" --config.train.batch_size=16
attention 124m-one 1 "${gpt[@]}" --config.train.batch_size=16
attention 124m-too-many 40 "${gpt[@]}" --config.train.batch_size=16
attention 124m-window 4 "${gpt[@]}" --config.train.batch_size=16 --config.model.window=200
attention 8b 6 "${large[@]}" --config.train.batch_size=1
attention 8b-window 6 "${large[@]}" --config.train.batch_size=1 --config.model.window=1000
attention wide 3 "${gpt[@]}" --config.train.batch_size=8 --config.model.num_heads=3
if ! "$python" benchmarks/gpu_results.py right "$results"; then
  exit 1
fi

training 124m "" "${gpt[@]}"
training 1b3 "" "${llama[@]}"
if ((gigabytes >= 100)) || $tiny; then
  training 8b "" "${large[@]}"
  training 8b-memory XLA_CLIENT_MEM_FRACTION=0.95 "${large[@]}"
else
  echo "8B: left out, its state of 96 GB does not fit into $gigabytes GB"
fi

training 124m-unroll "" "${gpt[@]}" --config.model.layers=unroll
training 124m-reference-rows16 "" "${gpt[@]}" --config.model.attention=reference --config.train.batch_size=16
training 124m-rows16 "" "${gpt[@]}" --config.train.batch_size=16
training 124m-heads128 "" "${gpt[@]}" --config.model.num_heads=6
training 124m-rows128 "" "${gpt[@]}" --config.train.batch_size=128
training 124m-chunk16k "" "${gpt[@]}" --config.train.loss_chunk=16384
training 124m-chunk64k "" "${gpt[@]}" --config.train.loss_chunk=65536
training 1b3-unroll "" "${llama[@]}" --config.model.layers=unroll
training 1b3-dots "" "${llama[@]}" --config.model.remat=dots
training 1b3-full-rows64 "" "${llama[@]}" --config.model.remat=full --config.train.batch_size=64
if ((gigabytes >= 100)); then
  training 8b-dots "" "${large[@]}" --config.model.remat=dots
  training 8b-rows4 "" "${large[@]}" --config.train.batch_size=4
  training 8b-unroll "" "${large[@]}" --config.model.layers=unroll
fi

# One flag at a time. llm_jax sets none: what wins here may be set, with its figure in docs/performance.md.
training 124m-triton --xla_gpu_enable_triton_gemm=false "${gpt[@]}"
training 124m-commands --xla_gpu_enable_command_buffer= "${gpt[@]}"
training 124m-o1 JAX_OPTIMIZATION_LEVEL=O1 "${gpt[@]}"
training 1b3-double-buffer --xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_DOUBLE_BUFFER "${llama[@]}"
training 1b3-triton --xla_gpu_enable_triton_gemm=false "${llama[@]}"
training 1b3-cudnn-gemm --xla_gpu_cudnn_gemm_fusion_level=1 "${llama[@]}"
training 1b3-memory XLA_CLIENT_MEM_FRACTION=0.95 "${llama[@]}"
training 124m-deterministic --xla_gpu_deterministic_ops=true "${gpt[@]}"
training 124m-muon "" "${gpt[@]}" --config.optimizer.name=muon
training 1b3-muon "" "${llama[@]}" --config.optimizer.name=muon
training 1b3-bfloat16-moments "" "${llama[@]}" --config.optimizer.moment_dtype=bfloat16

"$python" benchmarks/gpu_results.py table "$results"
