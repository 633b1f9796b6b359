// Loads a stored prompt over both paths with the C++ API: dual_path <directory for block files>
#include <dualkv/node.h>

#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

constexpr std::uint32_t kLayers = 4;
constexpr std::uint32_t kBlocks = 16;
constexpr std::uint64_t kLayerBytes = 8192;

// A KV cache of one plane a layer.
struct Cache {
  std::vector<std::vector<std::byte>> layers{kLayers, std::vector<std::byte>(kBlocks* kLayerBytes)};

  std::shared_ptr<const dualkv::PagedKv> describe(const dualkv::KvGeometry& geometry) {
    std::vector<std::vector<dualkv::Plane>> planes;
    for (auto& layer : layers) planes.push_back({{layer.data(), kLayerBytes, kLayerBytes}});
    return std::make_shared<dualkv::PagedKv>(geometry, planes, kBlocks);
  }
};

dualkv::NodeOptions options(const std::string& name, const std::string& root) {
  dualkv::NodeOptions options;
  options.name = name;
  options.store.root = root;
  options.staging.bytes = 4 << 20;
  options.listen = {"tcp://127.0.0.1:0"};
  return options;
}

int run(const std::string& root) {
  const dualkv::KvGeometry geometry(std::vector<std::uint64_t>(kLayers, kLayerBytes), 16, "example/cpp");
  dualkv::Node prefill(geometry, options("prefill", root));
  dualkv::Node decode(geometry, options("decode", root));
  dualkv::Peer peer = prefill.connect(decode.addresses()[0]);

  std::vector<std::uint32_t> tokens(kBlocks * geometry.tokens_per_block()), ids(kBlocks);
  std::iota(tokens.begin(), tokens.end(), 0u);
  std::iota(ids.begin(), ids.end(), 0u);
  const std::vector<dualkv::Key> keys = dualkv::block_keys(tokens, geometry);

  Cache stored;
  for (std::uint32_t i = 0; i < kLayers; ++i) std::memset(stored.layers[i].data(), 17 + i, stored.layers[i].size());
  const auto deadline = dualkv::Clock::now() + std::chrono::seconds(10);
  const auto source = stored.describe(geometry);
  if (const auto saved = prefill.store().save(keys, *source, ids, {}, deadline).wait(deadline); !saved.ok()) {
    throw dualkv::Error(saved);
  }

  dualkv::Split policy;
  dualkv::PlanRequest request;
  request.keys.assign(keys.begin(), keys.begin() + prefill.store().match(keys));
  request.prefill = prefill.view();
  request.decode = peer.view();

  Cache loaded, decoding;
  dualkv::Load load = prefill.load({policy.plan(request), loaded.describe(geometry), ids, 10, 0});
  dualkv::Incoming incoming = decode.incoming(load.id());
  for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
    if (const auto status = load.wait(layer); !status.ok()) throw dualkv::Error(status);
    load.publish(layer);  // after this layer's attention, in a real engine
  }
  if (const auto status = load.finish(); !status.ok()) throw dualkv::Error(status);
  if (const auto status = incoming.wait(); !status.ok()) throw dualkv::Error(status);
  incoming.copy_to(*decoding.describe(geometry), ids);

  const dualkv::LoadResult result = load.result();
  for (const dualkv::PathResult& path : result.paths) {
    std::printf("%s read %u blocks\n", path.node.c_str(), path.blocks);
  }
  const bool right = loaded.layers == stored.layers && decoding.layers == stored.layers;
  std::printf("every byte right on both sides: %s\n", right ? "yes" : "no");
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1]);
  } catch (const dualkv::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
