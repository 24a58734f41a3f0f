#!/usr/bin/env bash
# Writes requirements/lock.txt anew from pyproject.toml: every dependency but torch, pinned and hashed for all
# supported Pythons and systems. torch (and the CUDA libraries that its default wheel brings) stays out: its CPU and
# CUDA wheels have different hashes and dependencies; requirements/torch.txt pins its version alone.
# Needs `uv` (pip install uv).
set -euo pipefail
cd "$(dirname "$0")/.."
skip=()
for name in torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx; do
  skip+=(--no-emit-package "$name")
done
uv pip compile pyproject.toml requirements/torch.txt --extra dev --universal --python-version 3.11 \
  --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links "${skip[@]}" \
  --output-file requirements/lock.txt "$@"
