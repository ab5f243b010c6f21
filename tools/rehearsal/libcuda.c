/* A CUDA driver that checks what it is given and executes nothing, for the parts of it that Triton calls.

   It refuses what a GPU's driver refuses: grids, blocks and shared memory past the device's limits, images that are no
   cubins, tensor maps that are not aligned. cuGetErrorString says what was expected and what came.
   driver.py builds it as libcuda.so.1, sets the device by rehearsal_device and reads the counts. */
#include "cuda.h"

#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MACHINE_OF_CUDA 190       /* e_machine of a cubin */
#define UNASKED_SHARED_MEMORY 49152 /* bytes a launch may take before it asked for more */

typedef struct {
  char name[256];
  int most_shared;
} Function;

static struct {
  int major, minor, multiprocessors, most_shared, most_shared_of_multiprocessor;
} device = {9, 0, 132, 232448, 233472};
static unsigned long launches;
static char refusal[512] = "no error";
static const char *log_path;

EXPORT void rehearsal_device(int major, int minor, int multiprocessors, int most_shared) {
  device.major = major;
  device.minor = minor;
  device.multiprocessors = multiprocessors;
  device.most_shared = most_shared;
  device.most_shared_of_multiprocessor = most_shared + 1024;
}

EXPORT unsigned long rehearsal_launches(void) { return launches; }

/* A line for each launch: kernel, grid, block, bytes of shared memory. */
EXPORT void rehearsal_log(const char *path) { log_path = path ? strdup(path) : NULL; }

#define REFUSE(code, ...)                                \
  do {                                                   \
    snprintf(refusal, sizeof refusal, __VA_ARGS__);      \
    return code;                                         \
  } while (0)

EXPORT CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }

EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *found, int ordinal) {
  if (ordinal != 0) REFUSE(CUDA_ERROR_INVALID_DEVICE, "expected device 0, got %d", ordinal);
  *found = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : refusal;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice unused) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.minor; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device.most_shared; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device.most_shared_of_multiprocessor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1; /* clock rates and widths, which nothing here depends on */
  }
  return CUDA_SUCCESS;
}

/* One context, always current. */
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&device;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *found) { return cuDeviceGet(found, 0); }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice unused) { return cuCtxGetCurrent(context); }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != MACHINE_OF_CUDA)
    REFUSE(CUDA_ERROR_INVALID_IMAGE, "expected a cubin, got something else");
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  Function *function = calloc(1, sizeof *function); /* lives as long as the process, like the kernel */
  snprintf(function->name, sizeof function->name, "%s", name);
  function->most_shared = UNASKED_SHARED_MEMORY;
  *found = (CUfunction)function;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  Function *function = (Function *)handle;
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) return CUDA_SUCCESS;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    REFUSE(CUDA_ERROR_INVALID_VALUE, "expected an attribute that this driver knows, got %d", (int)attribute);
  if (value > device.most_shared)
    REFUSE(CUDA_ERROR_INVALID_VALUE, "%s: expected at most %d bytes of shared memory, got %d", function->name,
           device.most_shared, value);
  function->most_shared = value;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* Every address is one that the device can read: driver.py sees to it that tensors are on the device. */
EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *extents, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  if ((size_t)address % 16) REFUSE(CUDA_ERROR_INVALID_VALUE, "expected a tensor at a multiple of 16 bytes");
  for (cuuint32_t i = 0; i + 1 < rank; i++)
    if (strides[i] % 16) REFUSE(CUDA_ERROR_INVALID_VALUE, "expected strides in multiples of 16 bytes");
  for (cuuint32_t i = 0; i < rank; i++)
    if (box[i] == 0 || box[i] > 256) REFUSE(CUDA_ERROR_INVALID_VALUE, "expected a box of 1 to 256, got %u", box[i]);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  const Function *function = (const Function *)handle;
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const unsigned most_grid[] = {2147483647u, 65535, 65535}, most_block[] = {1024, 1024, 64};
  for (int i = 0; i < 3; i++) {
    if (grid[i] < 1 || grid[i] > most_grid[i])
      REFUSE(CUDA_ERROR_INVALID_VALUE, "%s: expected 1 to %u programs in dimension %d of the grid, got %u",
             function->name, most_grid[i], i, grid[i]);
    if (block[i] < 1 || block[i] > most_block[i])
      REFUSE(CUDA_ERROR_INVALID_VALUE, "%s: expected 1 to %u threads in dimension %d of the block, got %u",
             function->name, most_block[i], i, block[i]);
  }
  if ((unsigned long)block[0] * block[1] * block[2] > 1024)
    REFUSE(CUDA_ERROR_INVALID_VALUE, "%s: expected at most 1024 threads, got %lu", function->name,
           (unsigned long)block[0] * block[1] * block[2]);
  if (config->sharedMemBytes > (unsigned)function->most_shared)
    REFUSE(CUDA_ERROR_INVALID_VALUE, "%s: expected at most %d bytes of shared memory, got %u", function->name,
           function->most_shared, config->sharedMemBytes);
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  if (log_path) {
    FILE *log = fopen(log_path, "a");
    if (log) {
      fprintf(log, "%s %u %u %u %u %u\n", function->name, grid[0], grid[1], grid[2], block[0] * block[1] * block[2],
              config->sharedMemBytes);
      fclose(log);
    }
  }
  return CUDA_SUCCESS;
}
