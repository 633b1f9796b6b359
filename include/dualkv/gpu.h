// GPUs: which there are, and how Layer Blocks get into their memory and out of it.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

namespace dualkv {

// What copies Layer Blocks between host memory and a GPU's.
enum class GpuCopy : std::uint8_t {
  kAuto,    // by the size of the runs
  kMemcpy,  // a cuMemcpyAsync per run: what the DualPath paper measures at 5 to 7 us a call
  kBatch,   // cuMemcpyBatchAsync: one call for many runs; needs a driver of CUDA 12.8
  kKernel,  // a kernel of a few warps reads or writes the pinned staging itself; needs a build with nvcc
};

const char* to_string(GpuCopy engine);

struct GpuOptions {
  GpuCopy copy = GpuCopy::kAuto;
  // Sums up every Layer Block in the GPU's memory after it was copied there, with a kernel, and fails the load if it is
  // not what was saved. Costs one read of the memory; needs Layer Blocks of whole 64 bytes.
  bool verify = false;
  // Pinned memory, of each GPU and direction, for Layer Blocks on their way between it and peers.
  std::uint64_t bounce_bytes = std::uint64_t{128} << 20;
  // Memory of each GPU that this node's storage reads for it come to, past the host's memory, by cuFile (GPUDirect
  // Storage): they are copied on, and verified, within the GPU. 0 = reads come to the staging.
  std::uint64_t gds_bytes = 0;
  // Memory of each GPU, half that peers' NICs write to, half that this node's read, past the host's memory (GPUDirect
  // RDMA: by dma-buf or nvidia-peermem): what comes is verified there, and copied on within the GPU; what goes is
  // copied and summed up there. 0 = both go by pinned memory.
  std::uint64_t rdma_bytes = 0;
};

struct GpuCopyStats {
  std::uint64_t bytes = 0;
  std::uint64_t runs = 0;
  std::uint64_t verified = 0;               // Layer Blocks that were held against their checksums in the GPU's memory
  std::uint64_t batches[4] = {0, 0, 0, 0};  // by engine

  GpuCopyStats& operator+=(const GpuCopyStats& other) {
    bytes += other.bytes;
    runs += other.runs;
    verified += other.verified;
    for (std::size_t i = 0; i < std::size(batches); ++i) batches[i] += other.batches[i];
    return *this;
  }
};

struct GpuStats {
  int ordinal = 0;
  std::string name;
  GpuCopyStats to_gpu;
  GpuCopyStats from_gpu;
  GpuCopyStats within;
  GpuCopyStats from_gpus;              // from other GPUs of this process: Node::copy
  std::uint64_t bounce_bytes = 0;      // of both pools
  std::uint64_t gds_slots_bytes = 0;   // memory of the GPU that storage reads come to
  std::uint64_t gds_bytes = 0;         // that came that way and were found right
  std::uint64_t rdma_slots_bytes = 0;  // memory of the GPU that NICs write to and read
  std::uint64_t rdma_bytes = 0;        // that came that way and were found right
  std::uint64_t rdma_sent_bytes = 0;   // that went that way, and peers acknowledged
  std::uint64_t to_gpu_by_nic = 0;     // of host memory, by this node's NIC (NodeOptions::copy)
  std::uint64_t from_gpu_by_nic = 0;
  bool rdma_by_dma_buf = false;  // else by nvidia-peermem
};

struct GpuInfo {
  int ordinal = 0;
  std::string name;
  int driver_version = 0;  // of CUDA: 12080 is 12.8
  std::string no_batch;    // why kBatch can't be had; empty if it can
  std::string no_kernel;
};

// The GPUs that the driver shows this process. Opens them, which takes some 100 ms each. Throws Error(kUnsupported)
// where there is no driver.
std::vector<GpuInfo> gpus();
// The GPU that has the memory at `pointer`. Throws Error: kUnsupported where there is no driver, kInvalidArgument if it
// is not a GPU's.
int gpu_of(const void* pointer);

}  // namespace dualkv
