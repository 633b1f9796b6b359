// Reads into a GPU's memory, by cuFile (GPUDirect Storage), beside a reader of all others. The trailer, which the CPU
// checks, comes to the slot of the staging.
#include <sys/epoll.h>

#include <cerrno>

#include "memory/cuda_device.h"
#include "shim/cufile.h"
#include "storage/threaded_reader.h"

namespace dualkv {

namespace {

// A file as cuFile knows it.
class CuFile {
 public:
  CuFile(const cufile::Library& library, int fd) : library_(library) {
    cufile::Description description{cufile::kOpaqueFd, {fd}, nullptr};
    if (library.handle_register(&handle_, &description).error != cufile::kSuccess) handle_ = nullptr;
  }
  ~CuFile() {
    if (handle_ != nullptr) library_.handle_deregister(handle_);
  }
  CuFile(const CuFile&) = delete;
  CuFile& operator=(const CuFile&) = delete;
  bool valid() const { return handle_ != nullptr; }

  Outcome read(std::byte* target, FileRuns::Run run, std::uint64_t* bytes) const {
    std::uint64_t done = 0;
    while (done < run.bytes) {
      const auto at = static_cast<off_t>(run.offset + done);
      const ssize_t got = library_.read(handle_, target, run.bytes - done, at, at);
      if (got < 0) return {Code::kIo, got == -1 ? errno : EIO};
      if (got == 0) return {Code::kCorrupt, 0};  // shorter than its geometry
      done += static_cast<std::uint64_t>(got);
      *bytes += static_cast<std::uint64_t>(got);
    }
    return {};
  }

 private:
  const cufile::Library& library_;
  cufile::Handle handle_ = nullptr;
};

Outcome read_to_gpu(const KvGeometry& geometry, const FileAccess& access, const ReadRequest& request,
                    std::uint64_t* bytes) {
  const Fd fd = open_block(access, request);
  if (!fd.valid()) return open_failed(errno);
  if (request.trailer) {
    const Outcome outcome =
        read_fully(fd.get(), request.slot, {geometry.payload_bytes(), geometry.trailer_bytes()}, bytes);
    if (!outcome.ok()) return outcome;
  }
  try {
    const CudaDevice::Current current(*request.gpu);
    const CuFile file(*cufile::library(), fd.get());
    if (!file.valid()) return {Code::kIo, EIO};
    return file.read(request.gpu_slot, file_runs(geometry, request.layers, false).runs[0], bytes);
  } catch (const Error& error) {
    return {error.code(), error.status().os_errno};
  }
}

class GpuOrHostReader : public BlockReader {
 public:
  GpuOrHostReader(std::unique_ptr<BlockReader> host, std::unique_ptr<BlockReader> gpu)
      : host_(std::move(host)), gpu_(std::move(gpu)), events_(epoll_create1(EPOLL_CLOEXEC)) {
    for (const BlockReader* reader : {host_.get(), gpu_.get()}) {
      epoll_event event{EPOLLIN, {}};
      if (epoll_ctl(events_.get(), EPOLL_CTL_ADD, reader->event_fd(), &event) != 0) {
        throw Error(Code::kIo, "store: epoll", errno);
      }
    }
  }

  bool try_submit(const ReadRequest& request) noexcept override {
    return (request.gpu_slot != nullptr ? gpu_ : host_)->try_submit(request);
  }
  void flush() noexcept override {
    host_->flush();
    gpu_->flush();
  }
  std::size_t poll(std::span<ReadCompletion> out) noexcept override {
    const std::size_t count = host_->poll(out);
    return count + gpu_->poll(out.subspan(count));
  }
  int event_fd() const override { return events_.get(); }
  void idle() noexcept override { host_->idle(); }
  bool drain(Clock::time_point deadline) noexcept override {
    const bool host = host_->drain(deadline);
    return gpu_->drain(deadline) && host;
  }
  std::optional<Clock::time_point> next_wake() const override { return host_->next_wake(); }

 private:
  const std::unique_ptr<BlockReader> host_, gpu_;
  const Fd events_;
};

}  // namespace

std::unique_ptr<BlockReader> make_cufile_reader(std::unique_ptr<BlockReader> host, const KvGeometry& geometry,
                                                const FileAccess& access, std::uint32_t depth) {
  constexpr unsigned kThreads = 8;
  auto gpu = std::make_unique<ThreadedReader>(depth, kThreads,
                                              [geometry, access](const ReadRequest& request, std::uint64_t* bytes) {
                                                return read_to_gpu(geometry, access, request, bytes);
                                              });
  return std::make_unique<GpuOrHostReader>(std::move(host), std::move(gpu));
}

}  // namespace dualkv
