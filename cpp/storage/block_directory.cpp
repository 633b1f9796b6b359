// Directory operations of the block store, and garbage collection.
#include "storage/block_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <queue>

#include "base/clock.h"
#include "base/text.h"
#include "storage/block_format.h"

namespace dualkv {

namespace {

constexpr std::size_t kMostRemembered = 1 << 20;             // keys per in-memory map; beyond it the map starts afresh
constexpr std::int64_t kStaleTempSeconds = 3600;             // a save never takes this long: its writer is dead
constexpr std::int64_t kKeepCorruptSeconds = 7 * 24 * 3600;  // evidence is kept a week after the block's last use

std::string hex64(std::uint64_t value) {
  char out[17];
  std::snprintf(out, sizeof(out), "%016llx", static_cast<unsigned long long>(value));
  return out;
}

[[noreturn]] void fail(const std::string& what, const std::string& path, const char* cure) {
  throw Error(Code::kIo, text("store: ", what, " '", path, "'; ", cure), errno);
}

void make_directory(const std::string& path) {
  if (mkdir(path.c_str(), 0777) != 0 && errno != EEXIST) {
    fail("cannot create", path, "check that the parent exists and that this user may write there");
  }
}

using Directory = std::unique_ptr<DIR, int (*)(DIR*)>;

Directory open_directory(int at, const char* name) {
  const int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* stream = fd < 0 ? nullptr : fdopendir(fd);
  if (stream == nullptr && fd >= 0) ::close(fd);
  return Directory(stream, [](DIR* d) { return d == nullptr ? 0 : closedir(d); });
}

bool parse_key(const std::string& hex, Key* key) {
  if (hex.empty() || hex.size() % 2 != 0 || hex.size() / 2 > Key::kMaxBytes) return false;
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    const auto digit = [&](char c) {
      return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    };
    const int high = digit(hex[i]), low = digit(hex[i + 1]);
    if (high < 0 || low < 0) return false;
    bytes.push_back(static_cast<std::byte>(high << 4 | low));
  }
  *key = Key(bytes);
  return true;
}

// Blocks are spread over folders named by the first byte of their keys.
constexpr int kFolders = 256;

std::string folder_name(int index) {
  char name[3];
  std::snprintf(name, sizeof(name), "%02x", index);
  return name;
}

template <typename Map>
void bound(Map& map) {
  if (map.size() > kMostRemembered) map.clear();
}

}  // namespace

std::string block_path(const Key& key) {
  const std::string hex = key.hex();
  return hex.substr(0, 2) + "/" + hex + ".kv";
}

BlockDirectory::BlockDirectory(const KvGeometry& geometry, const StoreOptions& options)
    : geometry_(geometry), grace_s_(options.in_use_grace_s), forget_s_(options.forget_s) {
  if (options.root.empty()) throw Error(Code::kInvalidArgument, "store: the root is empty; give file:///directory");
  make_directory(options.root);
  path_ = options.root + "/" + hex64(checksum(std::as_bytes(std::span(geometry.namespace_name()))));
  make_directory(path_);
  directory_ = Fd(open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_.valid()) fail("cannot open", path_, "check its permissions");
  make_directory(path_ + "/tmp");
  for (int i = 0; i < kFolders; ++i) {
    const std::string name = folder_name(i);
    if (mkdirat(directory_.get(), name.c_str(), 0777) != 0 && errno != EEXIST) {
      fail("cannot create a folder in", path_, "check its permissions and free inodes");
    }
  }
  check_geometry_file();
}

// The first store of a namespace writes down its geometry; later ones must agree.
void BlockDirectory::check_geometry_file() const {
  const std::string mine = text(hex64(geometry_.fingerprint()), "\n", geometry_.describe(), "\n");
  const std::string temp = text("tmp/geometry-", getpid(), "-", hex64(reinterpret_cast<std::uintptr_t>(this)));
  {
    const Fd fd(openat(directory_.get(), temp.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (!fd.valid() || write(fd.get(), mine.data(), mine.size()) != static_cast<ssize_t>(mine.size()) ||
        fdatasync(fd.get()) != 0) {
      unlinkat(directory_.get(), temp.c_str(), 0);
      fail("cannot write in", path_, "check its permissions and free space");
    }
  }
  const int linked = linkat(directory_.get(), temp.c_str(), directory_.get(), "geometry", 0);
  if (linked == 0) {
    unlinkat(directory_.get(), temp.c_str(), 0);
    return;
  }
  std::string theirs(1024, '\0');
  const Fd fd(openat(directory_.get(), "geometry", O_RDONLY | O_CLOEXEC));
  const ssize_t got = fd.valid() ? read(fd.get(), theirs.data(), theirs.size()) : -1;
  if (got < 0) {
    unlinkat(directory_.get(), temp.c_str(), 0);
    fail("cannot read the geometry of", path_, "check its permissions");
  }
  theirs.resize(static_cast<std::size_t>(got));
  const bool torn = theirs.size() < 17;  // a fingerprint and its newline: written by hand, or by a dying disk
  if (torn) renameat(directory_.get(), temp.c_str(), directory_.get(), "geometry");
  unlinkat(directory_.get(), temp.c_str(), 0);
  if (torn || theirs.substr(0, 16) == mine.substr(0, 16)) return;
  throw Error(Code::kInvalidArgument, text("store: '", path_, "' holds blocks of another geometry: ",
                                           theirs.substr(std::min<std::size_t>(17, theirs.size())),
                                           "this node: ", geometry_.describe(), "; use another namespace or root"));
}

bool BlockDirectory::contains(const Key& key) const {
  struct stat info;
  if (fstatat(directory_.get(), block_path(key).c_str(), &info, 0) != 0) return false;
  return static_cast<std::uint64_t>(info.st_size) == geometry_.file_bytes();
}

bool BlockDirectory::forgotten(const Key& key) {
  const std::lock_guard lock(mutex_);
  return forgotten_locked(key);
}

bool BlockDirectory::forgotten_locked(const Key& key) {
  const auto found = forgotten_.find(key);
  if (found == forgotten_.end()) return false;
  if (found->second > Clock::now()) return true;
  forgotten_.erase(found);
  return false;
}

std::size_t BlockDirectory::match(std::span<const Key> keys) {
  std::size_t known = 0, missing = keys.size();
  while (known < missing) {
    const std::size_t probe = known + (missing - known) / 2;
    if (contains(keys[probe])) {
      known = probe + 1;
    } else {
      missing = probe;
    }
  }
  const auto now = Clock::now();
  for (std::size_t i = 0; i < known; ++i) {
    const std::lock_guard lock(mutex_);
    if (forgotten_locked(keys[i])) return i;  // or evicted since the search
    bound(uses_);
    uses_[keys[i]].last = now;
  }
  return known;
}

bool BlockDirectory::remove(const Key& key) {
  forget_until(key, Clock::time_point::max());  // a hole: what continues it can't be reached, whatever a search finds
  return unlinkat(directory_.get(), block_path(key).c_str(), 0) == 0;
}

bool BlockDirectory::quarantine(const Key& key) {
  const std::string path = block_path(key);
  forget_until(key, Clock::time_point::max());
  const std::string aside = path.substr(0, path.size() - 3) + ".corrupt";
  return renameat(directory_.get(), path.c_str(), directory_.get(), aside.c_str()) == 0;
}

void BlockDirectory::mark(std::span<const Key> keys) {
  const auto now = Clock::now();
  const auto again = to_duration(grace_s_ / 4);
  for (const Key& key : keys) {
    {
      const std::lock_guard lock(mutex_);
      bound(uses_);
      Use& use = uses_[key];
      if (use.marked + again > now) continue;
      use.marked = now;
    }
    utimensat(directory_.get(), block_path(key).c_str(), nullptr, 0);
  }
}

void BlockDirectory::forget(const Key& key) { forget_until(key, Clock::now() + to_duration(forget_s_)); }

void BlockDirectory::forget_until(const Key& key, Clock::time_point when) {
  const std::lock_guard lock(mutex_);
  forget_locked(key, when);
}

void BlockDirectory::forget_locked(const Key& key, Clock::time_point until) {
  bound(forgotten_);
  Clock::time_point& when = forgotten_[key];
  when = std::max(when, until);
}

void BlockDirectory::learn(const Key& key) {
  const std::lock_guard lock(mutex_);
  forgotten_.erase(key);
}

void BlockDirectory::pin(const Key& key) {
  const std::lock_guard lock(mutex_);
  ++pins_[key];
}

void BlockDirectory::unpin(const Key& key) {
  const std::lock_guard lock(mutex_);
  const auto found = pins_.find(key);
  if (--found->second == 0) pins_.erase(found);
}

std::vector<Key> BlockDirectory::list() const {
  std::vector<Key> keys;
  for (int i = 0; i < kFolders; ++i) {
    const std::string name = folder_name(i);
    const Directory folder = open_directory(directory_.get(), name.c_str());
    while (const dirent* entry = folder ? readdir(folder.get()) : nullptr) {
      const std::string file = entry->d_name;
      Key key;
      if (file.size() > 3 && file.ends_with(".kv") && parse_key(file.substr(0, file.size() - 3), &key)) {
        keys.push_back(key);
      }
    }
  }
  return keys;
}

std::vector<BlockDirectory::File> BlockDirectory::scan() const {
  std::vector<File> files;
  std::vector<std::byte> trailer(geometry_.trailer_bytes());
  for (const Key& key : list()) {
    const Fd fd(openat(directory_.get(), block_path(key).c_str(), O_RDONLY | O_CLOEXEC));
    struct stat info;
    if (!fd.valid() || fstat(fd.get(), &info) != 0) continue;  // removed meanwhile
    TrailerInfo about{key, {}};
    const off_t at = info.st_size - static_cast<off_t>(trailer.size());
    if (at >= 0 && pread(fd.get(), trailer.data(), trailer.size(), at) == static_cast<ssize_t>(trailer.size())) {
      read_trailer(trailer, &about);
    }
    files.push_back({key, about.parent, static_cast<std::uint64_t>(info.st_size), info.st_mtim});
  }
  return files;
}

bool BlockDirectory::claim(const File& file) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  const double age = static_cast<double>(now.tv_sec - file.last_use.tv_sec) +
                     static_cast<double>(now.tv_nsec - file.last_use.tv_nsec) * 1e-9;
  if (age < grace_s_) return false;
  const std::lock_guard lock(mutex_);
  if (pins_.contains(file.key)) return false;
  const auto use = uses_.find(file.key);
  if (use != uses_.end() && use->second.last + to_duration(grace_s_) > Clock::now()) return false;
  forget_locked(file.key, Clock::time_point::max());
  return true;
}

std::optional<std::uint64_t> BlockDirectory::collect(std::uint64_t quota_bytes) {
  // The kernel drops the lock when its holder dies, however it dies.
  const Fd lease(openat(directory_.get(), "tmp/.collector", O_RDWR | O_CREAT | O_CLOEXEC, 0666));
  if (!lease.valid()) fail("cannot open the collector's lease in", path_, "check its permissions");
  if (flock(lease.get(), LOCK_EX | LOCK_NB) != 0) return std::nullopt;
  remove_stale("tmp", "", kStaleTempSeconds);
  for (int i = 0; i < kFolders; ++i) {
    const std::string folder = folder_name(i);
    remove_stale(folder, ".corrupt", kKeepCorruptSeconds);
  }
  return evict(scan(), quota_bytes);
}

void BlockDirectory::remove_stale(const std::string& folder, const std::string& suffix, std::int64_t age_s) const {
  const Directory directory = open_directory(directory_.get(), folder.c_str());
  while (const dirent* entry = directory ? readdir(directory.get()) : nullptr) {
    struct stat info;
    const std::string name = text(folder, "/", entry->d_name);
    const bool stale = entry->d_name[0] != '.' && name.ends_with(suffix) &&
                       fstatat(directory_.get(), name.c_str(), &info, 0) == 0 &&
                       time(nullptr) - info.st_mtim.tv_sec > age_s;
    if (stale) unlinkat(directory_.get(), name.c_str(), 0);
  }
}

// Leaves in order of last use; a parent becomes a leaf when its last child is gone.
std::uint64_t BlockDirectory::evict(std::vector<File> files, std::uint64_t quota_bytes) {
  std::unordered_map<Key, std::size_t, KeyHash> index;
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < files.size(); ++i) {
    index.emplace(files[i].key, i);
    total += files[i].bytes;
  }
  // Blocks whose chain is broken can't be reached: they go first, whenever they were used.
  std::vector<bool> orphan(files.size(), false);
  for (std::size_t i = 0; i < files.size(); ++i) {
    std::size_t at = i;
    for (std::size_t steps = 0; steps <= files.size() && !files[at].parent.empty(); ++steps) {
      const auto parent = index.find(files[at].parent);
      if (parent == index.end() || orphan[parent->second]) {
        orphan[i] = true;
        break;
      }
      at = parent->second;
    }
  }
  std::vector<std::uint32_t> children(files.size(), 0);
  for (const File& file : files) {
    if (const auto parent = index.find(file.parent); parent != index.end()) ++children[parent->second];
  }
  const auto later = [&](std::size_t a, std::size_t b) {
    if (orphan[a] != orphan[b]) return !orphan[a];
    const timespec &x = files[a].last_use, &y = files[b].last_use;
    return std::tie(x.tv_sec, x.tv_nsec) > std::tie(y.tv_sec, y.tv_nsec);
  };
  std::priority_queue<std::size_t, std::vector<std::size_t>, decltype(later)> leaves(later);
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (children[i] == 0) leaves.push(i);
  }
  std::uint64_t evicted = 0;
  while (total > quota_bytes && !leaves.empty()) {
    File& file = files[leaves.top()];
    leaves.pop();
    // Another node may have used it since the scan.
    struct stat now;
    if (fstatat(directory_.get(), block_path(file.key).c_str(), &now, 0) == 0) file.last_use = now.st_mtim;
    if (!claim(file)) continue;
    evicted += remove(file.key);  // false: gone already, which frees it just as well
    total -= file.bytes;
    const auto parent = index.find(file.parent);
    if (parent != index.end() && --children[parent->second] == 0) leaves.push(parent->second);
  }
  return evicted;
}

}  // namespace dualkv
