// Compiles if, and only if, shim/cufile.h is what NVIDIA's header says. Needs cufile.h and cuda.h; run by
// tests/python/test_gpu.py.
#include <cufile.h>

#include <type_traits>

#include "shim/cufile.h"

namespace dualkv::cufile {

// The same number of parameters, each as large and as aligned, pointers for pointers.
template <typename A, typename B>
constexpr bool kLike =
    sizeof(A) == sizeof(B) && alignof(A) == alignof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <>
constexpr bool kLike<void, void> = true;
template <typename A, typename B>
constexpr bool kSame = false;
template <typename RA, typename... A, typename RB, typename... B>
  requires(sizeof...(A) == sizeof...(B))
constexpr bool kSame<RA (*)(A...), RB (*)(B...)> = kLike<RA, RB> && (kLike<A, B> && ...);

#define SAME(entry, function) static_assert(kSame<decltype(Library::entry), decltype(&function)>, #function)
SAME(driver_open, cuFileDriverOpen);
SAME(driver_get_properties, cuFileDriverGetProperties);
SAME(handle_register, cuFileHandleRegister);
SAME(handle_deregister, cuFileHandleDeregister);
SAME(buffer_register, cuFileBufRegister);
SAME(buffer_deregister, cuFileBufDeregister);
SAME(read, cuFileRead);

#define EQUAL(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs), #theirs)
EQUAL(kSuccess, CU_FILE_SUCCESS);
EQUAL(kOpaqueFd, CU_FILE_HANDLE_TYPE_OPAQUE_FD);
EQUAL(kStatusNvmeP2p, 1u << CU_FILE_NVME_P2P_SUPPORTED);
EQUAL(sizeof(Result), sizeof(CUfileError_t));
EQUAL(offsetof(Result, driver), offsetof(CUfileError_t, cu_err));
EQUAL(sizeof(Description), sizeof(CUfileDescr_t));
EQUAL(offsetof(Description, handle), offsetof(CUfileDescr_t, handle));
EQUAL(offsetof(Description, operations), offsetof(CUfileDescr_t, fs_ops));
EQUAL(sizeof(Properties), sizeof(CUfileDrvProps_t));
EQUAL(offsetof(Properties, minor_version), offsetof(CUfileDrvProps_t, nvfs.minor_version));
EQUAL(offsetof(Properties, status), offsetof(CUfileDrvProps_t, nvfs.dstatusflags));
EQUAL(offsetof(Properties, features), offsetof(CUfileDrvProps_t, fflags));
EQUAL(offsetof(Properties, max_batch_timeout_ms), offsetof(CUfileDrvProps_t, max_batch_io_timeout_msecs));

}  // namespace dualkv::cufile
