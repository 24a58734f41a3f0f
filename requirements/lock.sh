#!/usr/bin/env bash
# Writes the locks anew, each pinned and hashed for all supported Pythons and systems:
#   lock.txt     everything that pyproject.toml names, with the tools of development; what `make` installs
#   api.txt      what the API image needs: no torch and nothing of its kind, no command line
#   flower.txt   the same with Celery's monitor
#   worker.txt   what the worker image needs: no web server, no command line, no tools of development
#   deploy.txt   the tools that check deploy/ (deploy.in); big, so not part of lock.txt
# api, flower and worker are cut from lock.txt: the same versions, the same hashes.
# torch (and the CUDA libraries that its default wheel brings) stays out of all: its CPU and CUDA wheels have different
# hashes and dependencies; requirements/torch.txt pins its version alone.
# Needs `uv` (pip install uv) and Python 3.11 or newer. Arguments go to uv (`--upgrade`, `--upgrade-package NAME`).
set -euo pipefail
cd "$(dirname "$0")/.."
skip=()
for name in torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx; do
  skip+=(--no-emit-package "$name")
done
form=(--universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url
  --no-emit-find-links)

# roots NAME...: the dependencies of pyproject.toml, one per line, without those named.
roots() {
  python3 -c '
import re, sys, tomllib
left_out = set(sys.argv[1:])
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
names = {re.match(r"[\w.-]+", line)[0] for line in wanted}
if unknown := left_out - names:
    sys.exit(f"pyproject.toml does not name {unknown}")
print("\n".join(line for line in wanted if re.match(r"[\w.-]+", line)[0] not in left_out))
' "$@"
}

# cut FILE: requirements/FILE for the dependencies on standard input, in the versions of lock.txt.
cut_from_lock() {
  uv pip compile - --constraints requirements/lock.txt "${form[@]}" "${skip[@]}" --quiet \
    --output-file "requirements/$1" >/dev/null
}

command_line=(httpx rich typer)
web=(fastapi limits python-multipart uvicorn)
models=(accelerate diffusers peft prdc safetensors torch torchmetrics transformers)
pictures=(pydicom scikit-image scipy simpleitk) # the API registers and surveys what is uploaded
monitor=$(grep -o 'flower[^"]*' pyproject.toml)

if [[ ${1:-} != --cut-only ]]; then # --cut-only: leave lock.txt as it is
  uv pip compile pyproject.toml requirements/torch.txt --extra dev "${form[@]}" "${skip[@]}" \
    --output-file requirements/lock.txt "$@"
  uv pip compile requirements/deploy.in "${form[@]}" --quiet --output-file requirements/deploy.txt "$@"
fi
roots "${command_line[@]}" "${models[@]}" pydicom | cut_from_lock api.txt
{ roots "${command_line[@]}" "${models[@]}" "${pictures[@]}" && echo "$monitor"; } | cut_from_lock flower.txt
roots "${command_line[@]}" "${web[@]}" simpleitk | cut_from_lock worker.txt
