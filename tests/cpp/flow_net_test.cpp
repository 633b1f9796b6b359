// FlowNet: rates worked out by hand, and random networks against max-min fairness worked out over all of them.
#include "sim/flow_net.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <ostream>
#include <random>
#include <set>
#include <vector>

namespace dualkv::sim {
namespace {

void start(FlowNet& net, double now, double bytes, std::uint64_t owner, const std::vector<Hop>& hops) {
  std::array<Hop, FlowNet::kMaxHops> path{};
  std::copy(hops.begin(), hops.end(), path.begin());
  net.start(now, bytes, owner, path, hops.size());
}

// Bytes that crossed it; rates follow starts and ends with next_end().
double carried(FlowNet& net, LinkId link, double now) {
  net.next_end();
  return net.carried(link, now);
}

struct Ended {
  std::uint64_t owner;
  double at;
};

std::vector<Ended> run_out(FlowNet& net) {
  std::vector<Ended> out;
  while (net.flows() > 0) {
    const double at = net.next_end();
    out.push_back({net.finish_next(), at});
  }
  EXPECT_EQ(net.next_end(), FlowNet::kNever);
  return out;
}

void expect_ends(FlowNet& net, const std::vector<Ended>& wanted) {
  const std::vector<Ended> got = run_out(net);
  ASSERT_EQ(got.size(), wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].owner, wanted[i].owner) << "the end number " << i;
    EXPECT_NEAR(got[i].at, wanted[i].at, 1e-9 * std::max(1.0, wanted[i].at)) << "of flow " << wanted[i].owner;
  }
}

TEST(FlowNet, NothingEndsWithoutFlows) {
  FlowNet net;
  const LinkId link = net.add_link(100);
  EXPECT_EQ(net.next_end(), FlowNet::kNever);
  EXPECT_EQ(net.flows(), 0u);
  EXPECT_EQ(carried(net, link, 5), 0);
}

TEST(FlowNet, AloneOnOneLink) {
  FlowNet net;
  const LinkId link = net.add_link(100);
  start(net, 2, 250, 7, {{link}});
  EXPECT_EQ(net.flows(), 1u);
  EXPECT_DOUBLE_EQ(carried(net, link, 3), 100);
  expect_ends(net, {{7, 4.5}});
  EXPECT_DOUBLE_EQ(carried(net, link, 9), 250);
}

TEST(FlowNet, AsFastAsTheNarrowestLink) {
  FlowNet net;
  const LinkId wide = net.add_link(100), narrow = net.add_link(20), middle = net.add_link(50);
  start(net, 0, 100, 1, {{wide}, {narrow}, {middle}});
  EXPECT_DOUBLE_EQ(carried(net, wide, 1), 20);
  expect_ends(net, {{1, 5}});
  for (const LinkId link : {wide, narrow, middle}) EXPECT_DOUBLE_EQ(carried(net, link, 5), 100);
}

TEST(FlowNet, AlikeShareALink) {
  FlowNet net;
  const LinkId link = net.add_link(90);
  start(net, 0, 300, 1, {{link}});
  net.next_end();
  start(net, 1, 300, 2, {{link}});  // 210 left of the first: 45 each
  net.next_end();
  start(net, 3, 60, 3, {{link}});  // 120 and 210 left: 30 each
  // At 5: 60, 150 and 0 left; 45 each. At 6 1/3: 0 and 90 left.
  expect_ends(net, {{3, 5}, {1, 5 + 60.0 / 45}, {2, 5 + 60.0 / 45 + 1}});
  EXPECT_NEAR(carried(net, link, 100), 660, 1e-9);
}

TEST(FlowNet, WhoIsLimitedElsewhereLeavesItsShare) {
  FlowNet net;
  const LinkId shared = net.add_link(100), narrow = net.add_link(10);
  start(net, 0, 20, 1, {{shared}, {narrow}});  // 10
  start(net, 0, 450, 2, {{shared}});           // 90, not 50; from 2 on 100
  expect_ends(net, {{1, 2}, {2, 2 + 2.7}});
}

TEST(FlowNet, AChainOfLimits) {
  // First on A, second on A and B, third on B and C, fourth on C. A binds at 10, then B at 20, then C at 70.
  FlowNet net;
  const LinkId a = net.add_link(20), b = net.add_link(30), c = net.add_link(90);
  start(net, 0, 1e6, 1, {{a}});
  start(net, 0, 1e6, 2, {{a}, {b}});
  start(net, 0, 1e6, 3, {{b}, {c}});
  start(net, 0, 1e6, 4, {{c}});
  EXPECT_NEAR(carried(net, a, 1), 20, 1e-9);
  EXPECT_NEAR(carried(net, b, 1), 30, 1e-9);
  EXPECT_NEAR(carried(net, c, 1), 90, 1e-9);
  EXPECT_NEAR(net.next_end(), 1e6 / 70, 1e-6) << "the fourth has 70";
  // One more on A: 20/3 each, so the third gets 70/3 and the fourth 90 - 70/3, though neither touches A.
  start(net, 1, 1e6, 5, {{a}});
  EXPECT_NEAR(net.next_end(), 1 + (1e6 - 70) / (90 - 70.0 / 3), 1e-6);
}

TEST(FlowNet, AWeightOfTwoTakesTwice) {
  FlowNet net;
  const LinkId memory = net.add_link(90);
  start(net, 0, 90, 1, {{memory, 2}});
  EXPECT_DOUBLE_EQ(net.next_end(), 2) << "45 bytes/s make 90 of the link";
  start(net, 1, 60, 2, {{memory}});  // 90 / 3 = 30 each; 45 and 60 left
  expect_ends(net, {{1, 2.5}, {2, 2.5 + 15.0 / 90}});
  EXPECT_NEAR(carried(net, memory, 9), 2 * 90 + 60, 1e-9);
}

TEST(FlowNet, HighTakesItsShareFirst) {
  FlowNet net;
  const LinkId link = net.add_link(100, 75);
  start(net, 0, 50, 1, {{link}});
  expect_ends(net, {{1, 2}});
  EXPECT_DOUBLE_EQ(carried(net, link, 3), 50) << "of what is counted, HIGH is not a part";
  start(net, 4, 50, 2, {{link}});
  start(net, 4, 50, 3, {{link}});
  expect_ends(net, {{2, 8}, {3, 8}});
}

TEST(FlowNet, EqualEndsOfStrangersComeInTheOrderOfTheirStarts) {
  FlowNet net;
  for (std::uint64_t i = 0; i < 5; ++i) start(net, 0, 100, 10 + i, {{net.add_link(100)}});
  expect_ends(net, {{10, 1}, {11, 1}, {12, 1}, {13, 1}, {14, 1}});
}

TEST(FlowNet, EqualEndsOnOneLinkComeAtOnceAndAlwaysInOneOrder) {
  std::vector<std::uint64_t> orders[2];
  for (std::vector<std::uint64_t>& order : orders) {
    FlowNet net;
    const LinkId link = net.add_link(100);
    for (std::uint64_t i = 0; i < 5; ++i) start(net, 0, 100, i, {{link}});
    for (const Ended& end : run_out(net)) {
      EXPECT_DOUBLE_EQ(end.at, 5);
      order.push_back(end.owner);
    }
    EXPECT_DOUBLE_EQ(carried(net, link, 5), 500);
  }
  EXPECT_EQ(orders[0], orders[1]);
  std::sort(orders[0].begin(), orders[0].end());
  EXPECT_EQ(orders[0], (std::vector<std::uint64_t>{0, 1, 2, 3, 4}));
}

TEST(FlowNet, StartsAtTheInstantOfAnEnd) {
  FlowNet net;
  const LinkId link = net.add_link(100);
  start(net, 0, 100, 1, {{link}});
  start(net, 0, 300, 2, {{link}});
  EXPECT_DOUBLE_EQ(net.next_end(), 2);
  start(net, 2, 100, 3, {{link}});  // before the end is taken
  EXPECT_DOUBLE_EQ(net.next_end(), 2) << "what is due stays due";
  EXPECT_EQ(net.finish_next(), 1u);
  start(net, 2, 50, 4, {{link}});  // after; 200, 100 and 50 left, a third each
  expect_ends(net, {{4, 3.5}, {3, 4.5}, {2, 5.5}});
  EXPECT_NEAR(carried(net, link, 6), 550, 1e-9);
}

TEST(FlowNet, TwoLinksInCommon) {
  // All over the same two links: as one of them ends, the others share both anew.
  FlowNet net;
  const LinkId a = net.add_link(60), b = net.add_link(60), own = net.add_link(5);
  start(net, 0, 20, 1, {{a}, {b}});
  start(net, 0, 80, 2, {{a}, {b}});
  start(net, 0, 140, 3, {{b}, {a}});
  start(net, 0, 100, 4, {{own}});
  expect_ends(net, {{1, 1}, {2, 3}, {3, 4}, {4, 20}});
  EXPECT_NEAR(carried(net, a, 20), 240, 1e-9);
  EXPECT_NEAR(carried(net, b, 20), 240, 1e-9);
}

// --- Random networks

// All rates anew at each change, from all flows and all links.
class Oracle {
 public:
  struct Flow {
    std::vector<Hop> hops;
    double left = 0, rate = 0;
  };

  void add_link(double capacity) {
    capacity_.push_back(capacity);
    carried_.push_back(0);
  }
  void start(double now, std::uint64_t owner, double bytes, const std::vector<Hop>& hops) {
    advance(now);
    flows_[owner] = {hops, bytes, 0};
    fill();
  }
  double end_of(std::uint64_t owner) const { return now_ + flows_.at(owner).left / flows_.at(owner).rate; }
  double next_end() const {
    double out = FlowNet::kNever;
    for (const auto& [owner, flow] : flows_) out = std::min(out, end_of(owner));
    return out;
  }
  void finish(double now, std::uint64_t owner) {
    advance(now);
    flows_.erase(owner);
    fill();
  }
  void advance(double now) {
    for (auto& [owner, flow] : flows_) {
      flow.left -= flow.rate * (now - now_);
      for (const Hop& hop : flow.hops) carried_[hop.link] += flow.rate * hop.weight * (now - now_);
    }
    now_ = now;
  }
  double carried(LinkId link) const { return carried_[link]; }
  std::size_t flows() const { return flows_.size(); }

  // What max-min fair means: each flow crosses a full link on which nobody is faster, and no link is overfull.
  bool fair() const {
    bool out = true;
    for (LinkId link = 0; link < capacity_.size(); ++link) out &= used(link) <= capacity_[link] * (1 + 1e-9);
    for (const auto& [owner, flow] : flows_) {
      out &= std::any_of(flow.hops.begin(), flow.hops.end(), [&, rate = flow.rate](const Hop& hop) {
        return used(hop.link) >= capacity_[hop.link] * (1 - 1e-9) && fastest(hop.link) <= rate * (1 + 1e-9);
      });
    }
    return out;
  }

 private:
  static double weight(const Flow& flow, LinkId link) {
    for (const Hop& hop : flow.hops) {
      if (hop.link == link) return hop.weight;
    }
    return 0;
  }
  double used(LinkId link) const {
    double sum = 0;
    for (const auto& [owner, flow] : flows_) sum += weight(flow, link) * flow.rate;
    return sum;
  }
  double fastest(LinkId link) const {
    double most = 0;
    for (const auto& [owner, flow] : flows_) {
      if (weight(flow, link) > 0) most = std::max(most, flow.rate);
    }
    return most;
  }
  void fill() {
    std::set<std::uint64_t> growing;
    for (const auto& [owner, flow] : flows_) growing.insert(owner);
    while (!growing.empty()) {
      double level = FlowNet::kNever;
      LinkId full = 0;
      for (LinkId link = 0; link < capacity_.size(); ++link) {
        double left = capacity_[link], grows = 0;
        for (const auto& [owner, flow] : flows_) {
          if (growing.count(owner) > 0) {
            grows += weight(flow, link);
          } else {
            left -= weight(flow, link) * flow.rate;
          }
        }
        if (grows == 0 || left / grows >= level) continue;
        level = left / grows;
        full = link;
      }
      for (auto& [owner, flow] : flows_) {
        if (weight(flow, full) > 0 && growing.erase(owner) > 0) flow.rate = level;
      }
    }
  }

  std::map<std::uint64_t, Flow> flows_;
  std::vector<double> capacity_, carried_;
  double now_ = 0;
};

struct Shape {
  const char* name;
  std::size_t links, most_flows;
  int changes;
  bool alike;   // links of a few capacities, flows of a few sizes: ties everywhere
  bool heavy;   // weights other than 1
  double wide;  // part of the links that hardly ever bind
};

void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

class RandomNet : public ::testing::TestWithParam<Shape> {};

TEST_P(RandomNet, EndsWhenAllOfTheNetworkSays) {
  const Shape& shape = GetParam();
  for (unsigned seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto unit = [&] { return static_cast<double>(random() + 1.0) / 4294967296.0; };
    FlowNet net;
    Oracle oracle;
    for (std::size_t i = 0; i < shape.links; ++i) {
      double capacity = shape.alike ? 100.0 * static_cast<double>(1 + random() % 3) : 1 + 1000 * unit();
      if (unit() < shape.wide) capacity *= 1000;
      const double high = random() % 4 == 0 ? capacity : 0;
      net.add_link(capacity + high, high);
      oracle.add_link(capacity);
    }
    double now = 0;
    std::uint64_t next_owner = 1;
    std::vector<double> crossed(shape.links, 0);
    const auto check = [&] {
      ASSERT_TRUE(oracle.fair()) << "the oracle itself is wrong";
      ASSERT_EQ(net.flows(), oracle.flows());
      if (oracle.flows() == 0) {
        ASSERT_EQ(net.next_end(), FlowNet::kNever);
      } else {
        ASSERT_NEAR(net.next_end(), oracle.next_end(), 1e-9 * std::max(1.0, now));
      }
    };
    const auto start_one = [&] {
      std::vector<Hop> hops;
      const std::size_t count = 1 + random() % std::min(FlowNet::kMaxHops, shape.links);
      while (hops.size() < count) {
        const auto link = static_cast<LinkId>(random() % shape.links);
        if (std::any_of(hops.begin(), hops.end(), [&](const Hop& hop) { return hop.link == link; })) continue;
        const float weights[] = {1, 1, 2, 0.5f};
        hops.push_back({link, shape.heavy ? weights[random() % 4] : 1.0f});
      }
      const double bytes = shape.alike ? 300.0 * static_cast<double>(1 + random() % 4) : 1 + 5000 * unit();
      for (const Hop& hop : hops) crossed[hop.link] += bytes * hop.weight;
      start(net, now, bytes, next_owner, hops);
      oracle.start(now, next_owner++, bytes, hops);
    };
    const auto finish_one = [&] {
      const double at = net.next_end();
      ASSERT_GE(at, now);
      now = at;
      const std::uint64_t owner = net.finish_next();
      ASSERT_NEAR(oracle.end_of(owner), now, 1e-9 * std::max(1.0, now)) << "flow " << owner;
      oracle.finish(now, owner);
    };
    for (int i = 0; i < shape.changes; ++i) {
      const bool full = oracle.flows() >= shape.most_flows, none = oracle.flows() == 0;
      if (none || (!full && random() % 2 == 0)) {
        // Now, or some time before the next end.
        if (!none && random() % 3 > 0) now += (net.next_end() - now) * unit();
        start_one();
      } else {
        finish_one();
      }
      if (HasFatalFailure()) return;
      // More at the same instant, before rates are asked for.
      while (random() % 3 == 0) start_one();
      check();
      if (HasFatalFailure()) return;
      if (random() % 8 == 0) {
        const auto link = static_cast<LinkId>(random() % shape.links);
        oracle.advance(now);
        ASSERT_NEAR(net.carried(link, now), oracle.carried(link), 1e-9 * std::max(1.0, crossed[link]));
      }
    }
    while (oracle.flows() > 0) {
      finish_one();
      if (HasFatalFailure()) return;
      check();
      if (HasFatalFailure()) return;
    }
    for (LinkId link = 0; link < shape.links; ++link) {
      ASSERT_NEAR(net.carried(link, now), crossed[link], 1e-9 * std::max(1.0, crossed[link])) << "link " << link;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, RandomNet,
    ::testing::Values(Shape{"OneLink", 1, 12, 200, false, false, 0}, Shape{"TwoLinks", 2, 8, 200, false, false, 0},
                      Shape{"FewLinks", 4, 12, 200, false, false, 0.25},
                      Shape{"FewAlike", 4, 12, 200, true, false, 0.25}, Shape{"Weights", 5, 12, 200, false, true, 0.2},
                      Shape{"WeightsAlike", 5, 12, 200, true, true, 0.2},
                      Shape{"ManyLinks", 20, 16, 200, false, true, 0.5}, Shape{"Sparse", 30, 8, 200, false, false, 0}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace dualkv::sim
