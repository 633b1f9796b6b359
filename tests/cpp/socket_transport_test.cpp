// The end of a socket transport whose progress thread goes on.
#include <future>

#include "base/progress.h"
#include "support.h"
#include "transport/address.h"
#include "transport/grants.h"
#include "transport/peer_memory.h"
#include "transport/transport.h"

namespace dualkv::testing {
namespace {

struct Opened : LinkEvents {
  std::vector<std::shared_ptr<Link>> links;
  int refused = 0;

  void on_open(const std::shared_ptr<Link>& link) override { links.push_back(link); }
  void on_closed(Link&, const Status&) override {}
  void on_message(Link&, std::span<const std::byte>) override {}
  void on_write_done(Link&, std::uint64_t, Outcome) override {}
  void on_write_returned(Link&, std::uint64_t) override {}
  void on_refused() override { ++refused; }
  void on_hostile() override {}
  void on_fallback(const std::string&) override {}
};

// A node's storage may take its time to close, with its transports gone already.
TEST(SocketTransport, NothingItWaitedForComesOnceItHasGone) {
  const auto progress = std::make_shared<Progress>("test");
  GrantTable grants(small_geometry());
  Opened accepted, connected;
  TransportOptions options;
  options.name = "accepts";
  options.window_bytes = 1 << 20;
  options.handshake_s = 0.05;
  options.regions = std::make_shared<SharedRegions>();
  std::unique_ptr<Transport> accepting, connecting;
  std::promise<Status> answer;
  progress->run([&] {
    accepting = make_socket_transport(Scheme::kTcp, *progress, grants, accepted, options);
    options.name = "connects";
    connecting = make_socket_transport(Scheme::kTcp, *progress, grants, connected, options);
    const std::string address = accepting->listen(resolve("tcp://127.0.0.1:0", /*for_listening=*/true));
    connecting->connect(resolve(address, /*for_listening=*/false),
                        [&](const Status& status, const std::string&) { answer.set_value(status); });
  });
  const Status status = answer.get_future().get();
  ASSERT_TRUE(status.ok()) << status.message;
  progress->run([&] {
    for (Opened* side : {&accepted, &connected}) {
      for (const auto& link : side->links) link->close({Code::kCancelled, 0, "the test is over"});
    }
    accepting.reset();
    connecting.reset();
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // past all of its limits
  progress->run([&] {
    EXPECT_EQ(accepted.refused + connected.refused, 0);
    accepted.links.clear();
    connected.links.clear();
  });
  progress->stop();
}

}  // namespace
}  // namespace dualkv::testing
