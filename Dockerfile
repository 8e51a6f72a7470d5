# G2L from its wheel, for CPUs and NVIDIA GPUs:
#
#   docker build -t g2l:0.2 .                                  torch of the package index, which on x86-64 brings CUDA
#   docker build -t g2l:0.2 --build-arg TORCH_INDEX=URL .      torch of PyTorch's own index at URL: CPU alone, or a CUDA
#   docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" g2l:0.2 doctor --no-hub
#
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY g2l_core g2l_core
COPY pipeline pipeline
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
ARG TORCH_INDEX=""
ARG EXTRAS="demo,onnx,openvino"
COPY --from=build /wheels /wheels
# Torch first: what the second line installs is content with it.
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11,<2.14" "torchvision<0.29"; fi \
    && pip install --no-cache-dir --find-links /wheels "g2l[${EXTRAS}] @ file://$(ls /wheels/g2l-*.whl)" \
    && rm -r /wheels \
    && useradd --create-home --uid 1000 g2l \
    && mkdir /data \
    && chown g2l /data
# A user given with --user has no home here: what libraries keep goes where everybody may write.
ENV HF_HOME=/data/.hub \
    MPLCONFIGDIR=/tmp/matplotlib
USER 1000
WORKDIR /data
ENTRYPOINT ["g2l"]
CMD ["--help"]
