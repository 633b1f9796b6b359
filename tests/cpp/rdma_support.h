// What tests of RDMA share: faults on the way to a NIC's driver, and NICs that reach the stand-in of a GPU.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <functional>
#include <mutex>

#include "base/fd.h"
#include "node_support.h"
#include "shim/verbs.h"

namespace dualkv::testing {

// Puts a function before or in the place of a call to the driver, for as long as it lives. The call is made on progress
// threads: what the function uses must be ready for that.
class PostHook {
 public:
  using Hook = std::function<int(ibv_qp*, ibv_send_wr*)>;  // the call's result; 0 goes on to the driver
  static constexpr int kSwallow = -1;                      // the call succeeds, and does nothing
  explicit PostHook(Hook hook) {
    const std::lock_guard lock(mutex());
    if (real() == nullptr) real() = verbs()->post_send;
    current() = std::make_shared<Hook>(std::move(hook));
    verbs()->post_send = [](ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad) {
      std::shared_ptr<Hook> hook;
      {
        const std::lock_guard lock(mutex());
        hook = current();
      }
      if (hook) {
        if (const int result = (*hook)(qp, wr); result != 0) return result == kSwallow ? 0 : result;
      }
      return real()(qp, wr, bad);
    };
  }
  ~PostHook() {
    const std::lock_guard lock(mutex());
    current().reset();
  }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::shared_ptr<Hook>& current() {
    static std::shared_ptr<Hook> hook;
    return hook;
  }
  static decltype(Verbs::post_send)& real() {
    static decltype(Verbs::post_send) call = nullptr;
    return call;
  }
};

inline bool carries_data(const ibv_send_wr* wr) { return wr->num_sge > 0; }

// As long as it lives, NICs' drivers take the stand-in's GPU memory: soft-RoCE knows no dma-buf, and sees no more of
// that memory than the CPU does. What it registers is the same pages, by another mapping, at the GPU's addresses.
class NicsReachTheStandIn {
 public:
  enum class By { kDmaBuf, kPeerMemory, kNothing };
  explicit NicsReachTheStandIn(By by) : dma_buf_(verbs()->reg_dmabuf_mr), plain_(verbs()->reg_mr_iova2) {
    real_ = plain_;
    verbs()->reg_dmabuf_mr = [](ibv_pd*, std::uint64_t, std::size_t, std::uint64_t, int, int) -> ibv_mr* {
      errno = EOPNOTSUPP;
      return nullptr;
    };
    if (by == By::kDmaBuf) {
      verbs()->reg_dmabuf_mr = [](ibv_pd* domain, std::uint64_t offset, std::size_t bytes, std::uint64_t address,
                                  int fd, int access) {
        return by_fd(domain, fd, offset, bytes, address, static_cast<unsigned>(access));
      };
    }
    if (by == By::kPeerMemory) {
      verbs()->reg_mr_iova2 = [](ibv_pd* domain, void* memory, std::size_t bytes, std::uint64_t address,
                                 unsigned access) {
        int handle = -1;
        const auto result = cuda::driver()->mem_get_handle_for_address_range(
            &handle, reinterpret_cast<cuda::DevicePtr>(memory), bytes, cuda::kHandleDmaBuf, 0);
        const Fd fd(handle);
        if (result != cuda::kSuccess) return real_(domain, memory, bytes, address, access);
        return by_fd(domain, fd.get(), 0, bytes, address, access);
      };
    }
  }
  ~NicsReachTheStandIn() {
    verbs()->reg_dmabuf_mr = dma_buf_;
    verbs()->reg_mr_iova2 = plain_;
  }
  NicsReachTheStandIn(const NicsReachTheStandIn&) = delete;
  NicsReachTheStandIn& operator=(const NicsReachTheStandIn&) = delete;

 private:
  static ibv_mr* by_fd(ibv_pd* domain, int fd, std::uint64_t offset, std::size_t bytes, std::uint64_t address,
                       unsigned access) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
    if (pages == MAP_FAILED) return nullptr;
    ibv_mr* region = real_(domain, pages, bytes, address, access);
    munmap(pages, bytes);  // they stay pinned
    return region;
  }
  inline static decltype(Verbs::reg_mr_iova2) real_ = nullptr;
  const decltype(Verbs::reg_dmabuf_mr) dma_buf_;
  const decltype(Verbs::reg_mr_iova2) plain_;
};

}  // namespace dualkv::testing
