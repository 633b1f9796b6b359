// The oracle backend: a few threads that pread. Also the fallback where io_uring is not allowed.
#include <cerrno>

#include "storage/threaded_reader.h"

namespace dualkv {

FileRuns file_runs(const KvGeometry& geometry, LayerRange layers, bool trailer) {
  constexpr std::uint64_t kPage = KvGeometry::kPageBytes;
  const std::uint64_t begin = geometry.layer_offset(layers.first) / kPage * kPage;
  const std::uint64_t end = (geometry.layer_offset(layers.first + layers.count) + kPage - 1) / kPage * kPage;
  if (!trailer) return {{{begin, end - begin}, {}}, 1};
  if (end == geometry.payload_bytes()) return {{{begin, geometry.file_bytes() - begin}, {}}, 1};
  return {{{begin, end - begin}, {geometry.payload_bytes(), geometry.trailer_bytes()}}, 2};
}

std::unique_ptr<BlockReader> make_pread_reader(const KvGeometry& geometry, const FileAccess& access,
                                               std::uint32_t depth) {
  constexpr unsigned kThreads = 4;
  return std::make_unique<ThreadedReader>(
      depth, kThreads, [geometry, access](const ReadRequest& request, std::uint64_t* bytes) -> Outcome {
        const Fd fd = open_block(access, request);
        if (!fd.valid()) return open_failed(errno);
        const FileRuns runs = file_runs(geometry, request.layers, request.trailer);
        for (int i = 0; i < runs.count; ++i) {
          const Outcome outcome = read_fully(fd.get(), request.slot, runs.runs[i], bytes);
          if (!outcome.ok()) return outcome;
        }
        return {};
      });
}

}  // namespace dualkv
