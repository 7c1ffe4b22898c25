# docker build -t clever . && docker run --gpus all --shm-size 8g -v /data:/data -it clever
# Other versions of torch: --build-arg BASE=pytorch/pytorch:<tag>
ARG BASE=pytorch/pytorch:2.6.0-cuda12.4-cudnn9-devel
FROM ${BASE}

WORKDIR /workspace/clever
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
# The compiled selective scan and view renderer. Without a GPU at hand, name the architectures.
RUN SCAN_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0 8.6 8.9 9.0+PTX" python csrc/selective_scan/setup.py build_ext --inplace \
    && python csrc/views/setup.py build_ext --inplace
CMD ["bash"]
