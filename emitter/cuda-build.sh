#!/usr/bin/env bash
# Compile the emitter with candle's CUDA kernels where there is neither a GPU nor a CUDA toolkit: nvcc comes as wheels.
#   cuda-build.sh CACHE PACKAGES PYTHON    PACKAGES: where torch's own CUDA libraries are; PYTHON: one that has uv
#   CUDA_COMPUTE_CAP    90 (Hopper) by default; 80 for Ampere
# The binary needs a driver, libcuda.so.1, to start; see docs/nightly.md.
set -euo pipefail
cache=$1 packages=$2 python=$3
cd "$(dirname "$0")"

key=$(sha256sum cuda.lock | cut -c 1-24)
home=$cache/cuda/$key
if [ ! -d "$home" ]; then
    mkdir -p "$cache/cuda"
    making=$(mktemp -d "$cache/cuda/.making-XXXXXX")
    trap 'rm -rf "$making"' EXIT
    "$python" -m uv pip install --quiet --require-hashes --no-deps --target "$making" --requirement cuda.lock
    chmod +x "$making"/nvidia/cu13/bin/* "$making"/nvidia/cu13/nvvm/bin/*
    # The linker asks for names without a version, and for the driver's library, which no wheel has.
    mkdir "$making/link"
    for lib in cublas cublasLt curand cudart nvrtc; do
        found=$(find "$making/nvidia" "$packages/nvidia/cu13/lib" -name "lib$lib.so.*" | head -n 1)
        [ -n "$found" ] || { echo "cuda-build: no lib$lib.so in $packages, which the CUDA build of torch has" >&2; exit 2; }
        ln -sr "$found" "$making/link/lib$lib.so"
    done
    echo | gcc -shared -x c -o "$making/link/libcuda.so" -Wl,-soname,libcuda.so.1 -
    mv "$making" "$home"
    trap - EXIT
fi

cuda=$home/nvidia/cu13
export CUDA_HOME=$cuda CUDA_PATH=$cuda CUDA_ROOT=$cuda CUDA_TOOLKIT_ROOT_DIR=$cuda PATH=$cuda/bin:$PATH
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
flags="-L native=$home/link -C link-arg=-Wl,--no-as-needed -C link-arg=-lcuda -C link-arg=-lnvrtc"
flags+=" -C link-arg=-lcublasLt -C link-arg=-Wl,--unresolved-symbols=ignore-all -C link-arg=-Wl,--allow-shlib-undefined"
# With a target named, the flags do not apply to build scripts, which have to start here.
host=$(rustc -vV | sed -n 's/^host: //p')
started=$SECONDS
RUSTFLAGS=$flags CARGO_TARGET_DIR=$cache/target/cuda cargo build --release --locked --features cuda --target "$host"
built=$cache/target/cuda/$host/release/parity-emitter
strip -o "$built.stripped" "$built"
command -v xz >/dev/null && xz --keep --force "$built.stripped" # to be carried to a GPU
echo "built in $((SECONDS - started)) s: $built, $(du -m "$built" | cut -f 1) MB, stripped $(du -m "$built.stripped" | cut -f 1) MB"
needed=$(readelf -d "$built" | grep -c 'NEEDED.*\(libcuda\|libcublas\|libcurand\|libnvrtc\)')
[ "$needed" -ge 4 ] || { echo "cuda-build: the binary links $needed of CUDA's libraries" >&2; exit 1; }
