// The CUDA library: chooses and launches the kernels. It needs the CUDA runtime only, so one build serves every torch.

#include "images_backward.cuh"
#include "images_forward.cuh"

namespace {

const char* const TOO_LARGE = "the CUDA selective scan takes less than 2^31 numbers per sample and blocks per call";

const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

cudaError_t shared_limit(int64_t device, int& bytes) {
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, int(device));
}

int64_t divide_up(int64_t of, int64_t by) { return (of + by - 1) / by; }

// How a call is divided on a device with `limit` bytes of shared memory per block.
ImagePlan plan_images(const ScanCudaImages& args, bool backward, int limit) {
  ImagePlan plan{};
  plan.height = int(args.height);
  plan.width = int(args.width);
  plan.channels = int(args.channels);
  plan.rank = int(args.rank);
  plan.states = int(args.states);
  plan.length = plan.height * plan.width;
  plan.columns = plan.rank + 2 * plan.states;
  plan.channel_blocks = int(divide_up(args.channels, CHANNELS));
  plan.warps = int(args.warps);
  plan.samples = int(args.samples);
  plan.tiles = int(divide_up(plan.length, args.warps * WARP_STEPS));
  // floor(step * m / 2^32) is step / height as long as step * height < 2^32
  if (args.height > 1 && plan.length * args.height < int64_t(1) << 32)
    plan.divide = unsigned((int64_t(1) << 32) / args.height + 1);
  plan.sums_shared = int64_t(plan.length) * plan.samples * CHANNELS < limit / 4;
  if (plan.sums_shared)
    plan.sums_shared = image_layout(plan, plan.states, backward).size * 4 <= limit;
  return plan;
}

using ImageKernel = void (*)(const ScanCudaImages, const ImagePlan);

template <typename T>
ImageKernel image_kernel(bool backward, bool one_state) {
  if (backward) return one_state ? images_backward<T, true> : images_backward<T, false>;
  return one_state ? images_forward<T, true> : images_forward<T, false>;
}

const char* run_images(ScanCudaImages args, bool backward) {
  const int64_t length = args.height * args.width, columns = args.rank + 2 * args.states;
  const int64_t blocks = divide_up(args.batch, args.samples) * divide_up(args.channels, CHANNELS);
  if (length * (args.channels + 4 * columns) >> 31 || blocks >> 31) return TOO_LARGE;
  if (blocks == 0) return nullptr;

  int limit = 0;
  if (const cudaError_t error = cudaSetDevice(int(args.device))) return words(error);
  if (const cudaError_t error = shared_limit(args.device, limit)) return words(error);
  const ImagePlan plan = plan_images(args, backward, limit);
  const int bytes = 4 * image_layout(plan, plan.states, backward).size;
  if (bytes > limit) return "the rank of delta or the number of states is too large for this device's shared memory";
  if (!args.scratch) args.scratch = static_cast<float*>(args.dx);

  ImageKernel kernel = nullptr;
  if (args.type == SCAN_FLOAT32) kernel = image_kernel<float>(backward, args.states == 1);
  if (args.type == SCAN_BFLOAT16) kernel = image_kernel<Bfloat16>(backward, args.states == 1);
  if (args.type == SCAN_FLOAT16) kernel = image_kernel<Float16>(backward, args.states == 1);
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error) return words(error);
  LAUNCH(kernel, unsigned(blocks), plan.warps * plan.samples * WARP, bytes, static_cast<cudaStream_t>(args.stream), args, plan);
  return words(cudaGetLastError());
}

}  // namespace

extern "C" {

const char* scan_cuda_images_forward(const ScanCudaImages* args) { return run_images(*args, false); }
const char* scan_cuda_images_backward(const ScanCudaImages* args) { return run_images(*args, true); }

const char* scan_cuda_unavailable(int64_t device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(int(device));
  if (!error) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(image_kernel<float>(true, true)));
  cudaGetLastError();  // clears the error, or the next call would report it
  return words(error);
}

int64_t scan_cuda_images_scratch(const ScanCudaImages* args) {
  int limit = 0;
  if (args->type == SCAN_FLOAT32 || shared_limit(args->device, limit)) return 0;
  return plan_images(*args, true, limit).sums_shared ? 0 : args->batch * args->height * args->width * args->channels;
}

int scan_abi_version(void) { return SCAN_ABI_VERSION; }
}
