// BlockDirectory: the files of one namespace - names, existence, use, removal, collection. Synchronous.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/fd.h"
#include "dualkv/geometry.h"
#include "dualkv/keys.h"
#include "dualkv/operation.h"
#include "dualkv/store.h"

namespace dualkv {

// Relative to the namespace directory: "ab/ab12....kv".
std::string block_path(const Key& key);

// Owns the directory's fd. Thread-safe.
class BlockDirectory {
 public:
  // Creates the namespace directory, or checks that it holds blocks of this geometry. Throws Error.
  BlockDirectory(const KvGeometry& geometry, const StoreOptions& options);

  int fd() const { return directory_.get(); }
  const std::string& path() const { return path_; }

  bool contains(const Key& key) const;
  // Stored, and not known to be bad: a save may skip it.
  bool good(const Key& key) { return contains(key) && !forgotten(key); }
  // Blocks of the hit, which are used from now on: this process evicts none of them within the grace.
  std::size_t match(std::span<const Key> keys);
  bool remove(const Key& key);
  bool quarantine(const Key& key);

  // Tells other processes of the use, on disk; skips what was marked less than a quarter of the grace ago.
  void mark(std::span<const Key> keys);
  // A failed block is not advertised for forget_s, or until it is saved again.
  void forget(const Key& key);
  void learn(const Key& key);
  // Pinned blocks are never evicted by this process.
  void pin(const Key& key);
  void unpin(const Key& key);

  std::vector<Key> list() const;
  // See Store::collect. `evicted` counts blocks.
  std::optional<std::uint64_t> collect(std::uint64_t quota_bytes);

 private:
  struct File {
    Key key;
    Key parent;
    std::uint64_t bytes;
    timespec last_use;
  };
  struct Use {
    // The last of this process, and of those on disk.
    Clock::time_point last = Clock::time_point::min(), marked = Clock::time_point::min();
  };
  void check_geometry_file() const;
  std::vector<File> scan() const;
  void remove_stale(const std::string& folder, const std::string& suffix, std::int64_t age_s) const;
  std::uint64_t evict(std::vector<File> files, std::uint64_t quota_bytes);
  // False if it is in use; else no match finds it any more.
  bool claim(const File& file);
  bool forgotten(const Key& key);
  void forget_until(const Key& key, Clock::time_point when);
  // With mutex_ held.
  bool forgotten_locked(const Key& key);
  void forget_locked(const Key& key, Clock::time_point until);

  const KvGeometry geometry_;
  const double grace_s_;
  const double forget_s_;
  std::string path_;
  Fd directory_;
  std::mutex mutex_;  // guards what follows
  std::unordered_map<Key, Clock::time_point, KeyHash> forgotten_;
  std::unordered_map<Key, Use, KeyHash> uses_;
  std::unordered_map<Key, int, KeyHash> pins_;
};

}  // namespace dualkv
