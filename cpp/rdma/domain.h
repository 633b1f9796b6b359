// RdmaDomain: a node's open ports and the memory registered with them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/worker.h"
#include "memory/known_memory.h"
#include "rdma/rail.h"
#include "rdma/registrations.h"

namespace dualkv {

// Must outlive the queue pairs on its rails. Progress thread only.
class RdmaDomain {
 public:
  // `note` counts fallbacks. Throws Error as Rail::open_all does.
  RdmaDomain(const RdmaOptions& options, const DevicePlace& near, Progress& progress, const KnownMemory& known,
             const std::function<void(const std::string&)>& note)
      : options_(options),
        rails_(Rail::open_all(options, near, progress, [note](const std::string&) { note("rdma_device_fault"); })),
        registrations_(progress, pinning_, known, rails_, options_, note) {}

  const RdmaOptions& options() const { return options_; }
  const std::vector<std::unique_ptr<Rail>>& rails() const { return rails_; }
  Registrations& registrations() { return registrations_; }
  // For calls that may block.
  Worker& worker() { return worker_; }

 private:
  const RdmaOptions options_;
  const std::vector<std::unique_ptr<Rail>> rails_;
  // They end after the registrations and before the rails.
  Worker worker_;
  Worker pinning_;
  Registrations registrations_;
};

}  // namespace dualkv
