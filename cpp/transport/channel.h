// Channel: one non-blocking stream socket that sends and receives frames.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "base/fd.h"
#include "base/progress.h"
#include "transport/grants.h"
#include "transport/wire.h"

namespace dualkv {

class Channel;

class ChannelOwner {
 public:
  virtual ~ChannelOwner() = default;
  // False closes the channel as hostile. For kWrite the owner calls channel.receive() before it returns true.
  virtual bool on_frame(Channel& channel, FrameType type, std::span<const std::byte> body) = 0;
  virtual void on_payload(Channel& channel, InboundWrite& write) = 0;
  // Once. The channel is closed already.
  virtual void on_channel_closed(Channel& channel, const Status& why, bool hostile) = 0;
};

// A frame to send: its head is copied, its payload borrowed.
struct OutFrame {
  std::vector<std::byte> head;
  std::vector<iovec> payload;
  std::uint64_t write_id = 0;  // 0 for other frames
  std::uint64_t sent = 0;
  std::vector<std::byte> copy;  // of the payload, after its owner took the memory back

  std::uint64_t bytes() const;
};

// Progress thread only. Held by shared_ptr, so that closing it inside its own handler is safe.
class Channel : public std::enable_shared_from_this<Channel> {
 public:
  // `owner` must outlive the channel's open time.
  Channel(Progress& progress, Fd fd, ChannelOwner& owner);
  ~Channel();

  void start();
  int fd() const { return fd_.get(); }
  bool open() const { return fd_.valid(); }
  void set_owner(ChannelOwner& owner) { owner_ = &owner; }
  // Until the peer has proved itself, only handshake frames are taken: nothing larger is ever allocated for it.
  void set_proven() { proven_ = true; }
  // Paused channels leave what arrives in the kernel.
  void set_reading(bool reading);

  void send(OutFrame frame);
  void send(FrameType type, std::span<const std::byte> body) { send({encode_frame(type, body), {}, 0, 0, {}}); }
  std::uint64_t queued_bytes() const { return queued_bytes_; }
  // True if the write was not sent at all and is gone; false if it was, partly or wholly: what is left of it is
  // copied, so that its source is free either way.
  bool withdraw(std::uint64_t write_id);
  void receive(std::unique_ptr<InboundWrite> write) { inbound_ = std::move(write); }
  void close(const Status& why, bool hostile = false);
  // Closes when everything queued has been sent.
  void close_after_sending();

 private:
  void on_events(std::uint32_t events);
  void read_some();
  // Each returns false when there is nothing more to read now.
  bool read_header();
  bool read_body();
  bool read_payload();
  bool received(ssize_t got);
  void dispatch();
  void write_some();
  void rearm();

  Progress& progress_;
  Fd fd_;
  ChannelOwner* owner_;
  bool reading_ = true;
  bool proven_ = false;
  bool closing_ = false;  // once the queue is sent
  std::uint32_t armed_ = 0;
  std::deque<OutFrame> queue_;
  std::uint64_t queued_bytes_ = 0;
  std::array<std::byte, FrameHeader::kBytes> header_bytes_{};
  FrameHeader header_;
  std::vector<std::byte> body_;
  std::size_t filled_ = 0;  // of the header, then of the body
  bool in_body_ = false;
  std::unique_ptr<InboundWrite> inbound_;
};

}  // namespace dualkv
